//! What each type of request does.

use super::events::payload;
use super::{Action, Client, ClientId, INTRODUCE, OK, RELEASE, Store, watch_bytes};
use crate::permissions::{Access, Asker, Permission, domain};
use crate::transaction::{Aspect, Change, Transaction};
use crate::tree::Node;
use crate::watches::Watch;
use crate::wire::{first_string, only_string, strings};
use crate::{Error, Path};
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use hypercall_abi::DomId;
use hypercall_abi::io::xenstore::{MessageHeader, MessageType, PAYLOAD_MAX, REL_PATH_MAX};

/// What a request leads to.
enum Answer {
    /// This reply.
    Now(Vec<u8>),
    /// The reply follows when this is done.
    After(Action),
    /// This reply, and something to do.
    With(Vec<u8>, Action),
    /// This reply, and then the first event of a watch.
    Watching(Arc<[u8]>),
}

fn ok() -> Result<Answer, Error> {
    Ok(Answer::Now(OK.into()))
}

/// A request as its handler sees it.
struct Request<'a> {
    client: ClientId,
    header: MessageHeader,
    payload: &'a [u8],
    asker: Asker,
    transaction: Option<(ClientId, u32)>,
    now_ns: u64,
}

impl Store {
    /// Takes a request of a client's. The reply, and watch events, are in the queues afterwards, unless something has to be
    /// done first.
    pub fn request(
        &mut self,
        client: ClientId,
        header: MessageHeader,
        payload: &[u8],
        now_ns: u64,
    ) -> Option<Action> {
        self.clients.get(&client)?;
        self.probe();
        let (reply, action) = match self.handle(client, header, payload, now_ns) {
            Ok(Answer::Now(reply)) => (Ok(reply), None),
            Ok(Answer::With(reply, action)) => (Ok(reply), Some(action)),
            Ok(Answer::After(action)) => return Some(action),
            Ok(Answer::Watching(first)) => {
                self.answer(client, header, Ok(OK.into()));
                self.probe();
                self.send_event(client, first, None, now_ns);
                return None;
            }
            Err(error) => (Err(error), None),
        };
        self.answer(client, header, reply);
        self.probe();
        action
    }

    /// A request whose reply is wanted at once, from a part of the control domain; events stay in the queue.
    ///
    /// # Errors
    /// The reply's; [`Error::Unknown`] for requests that need an [`Action`].
    pub fn ask(
        &mut self,
        client: ClientId,
        header: MessageHeader,
        payload: &[u8],
        now_ns: u64,
    ) -> Result<Vec<u8>, Error> {
        let kind = MessageType::from_number(header.kind.into());
        if matches!(kind, Some(MessageType::Introduce | MessageType::Release)) {
            return Err(Error::Unknown);
        }
        match self.handle(client, header, payload, now_ns)? {
            Answer::Now(reply) if reply.len() <= PAYLOAD_MAX => Ok(reply),
            Answer::Now(_) => Err(Error::TooBig),
            Answer::Watching(first) => {
                self.send_event(client, first, None, now_ns);
                Ok(OK.into())
            }
            Answer::After(_) | Answer::With(..) => Err(Error::Unknown),
        }
    }

    /// Sends the reply to a request that had to wait for an [`Action`].
    pub fn answer(&mut self, client: ClientId, header: MessageHeader, reply: Result<Vec<u8>, Error>) {
        let reply =
            reply.and_then(|reply| if reply.len() > PAYLOAD_MAX { Err(Error::TooBig) } else { Ok(reply) });
        match reply {
            Ok(reply) => self.reply(client, header, &reply),
            Err(error) => {
                let header = MessageHeader { kind: MessageType::Error.number(), ..header };
                self.reply(client, header, format!("{error}\0").as_bytes());
            }
        }
    }

    fn handle(
        &mut self,
        client: ClientId,
        header: MessageHeader,
        payload: &[u8],
        now_ns: u64,
    ) -> Result<Answer, Error> {
        use MessageType as M;
        let kind = M::from_number(header.kind.into()).ok_or(Error::Unknown)?;
        let asker = self.asker(client);
        let control_only = matches!(
            kind,
            M::Control | M::Introduce | M::Release | M::IsDomainIntroduced | M::Resume | M::SetTarget
        );
        if control_only && !asker.privileged {
            return Err(Error::Access);
        }
        let keeps = matches!(kind, M::Write | M::Mkdir | M::SetPerms | M::Watch | M::TransactionStart);
        if self.full && keeps && !asker.privileged {
            return Err(Error::Memory);
        }
        let alone = matches!(kind, M::Watch | M::Unwatch);
        let transaction = (header.tx_id != 0 && !alone).then_some((client, header.tx_id));
        if let Some((_, id)) = transaction
            && self.clients.get(&client).is_none_or(|known| !known.transactions.contains_key(&id))
        {
            return Err(Error::NotFound);
        }
        let request = Request { client, header, payload, asker, transaction, now_ns };
        match kind {
            M::Directory => self.read(&request, only_string(payload)?, Aspect::Children, directory),
            M::DirectoryPart => self.directory_part(&request),
            M::Read => self.read(&request, only_string(payload)?, Aspect::Itself, |node| node.value.to_vec()),
            M::GetPerms => {
                self.read(&request, only_string(payload)?, Aspect::Itself, |node| node.permissions.to_wire())
            }
            M::Write => {
                let (path, value) = first_string(payload)?;
                self.change(&request, path, |path| Change::Write(path, Arc::from(value)))
            }
            M::Mkdir => self.change(&request, only_string(payload)?, Change::Make),
            M::Rm => self.change(&request, only_string(payload)?, Change::Remove),
            M::SetPerms => self.set_permissions(&request),
            M::Watch => self.watch(&request),
            M::Unwatch => self.unwatch(&request),
            M::ResetWatches => {
                self.drop_watches(client);
                self.drop_transactions(client);
                ok()
            }
            M::TransactionStart => self.start(&request),
            M::TransactionEnd => self.end(&request),
            M::GetDomainPath => {
                let home = Path::home(domain(only_string(payload)?)?);
                Ok(Answer::Now(format!("{home}\0").into_bytes()))
            }
            M::IsDomainIntroduced => {
                let domain = domain(only_string(payload)?)?;
                let known = domain == DomId::SELF || self.is_introduced(domain);
                Ok(Answer::Now(if known { b"T\0" } else { b"F\0" }.to_vec()))
            }
            M::Introduce => introduce(&request),
            M::Release => self.release(&request),
            M::Resume => {
                let domain = self.introduced_domain(only_string(payload)?)?;
                if let Some(known) = self.domains.get_mut(&domain) {
                    known.shut_down = false;
                }
                ok()
            }
            M::SetTarget => self.set_target(&request),
            M::Control => self.control_command(payload).map(Answer::Now),
            M::WatchEvent | M::Error => Err(Error::Unknown),
        }
    }

    fn home(&self, client: ClientId) -> Result<&Path, Error> {
        self.clients.get(&client).map(|client| &*client.home).ok_or(Error::NotFound)
    }

    fn open_transaction(&mut self, (client, id): (ClientId, u32)) -> Result<&mut Transaction, Error> {
        let open = self.clients.get_mut(&client).and_then(|client| client.transactions.get_mut(&id));
        open.ok_or(Error::NotFound)
    }

    /// Something that is read of a node.
    fn read(
        &mut self,
        request: &Request<'_>,
        path: &[u8],
        aspect: Aspect,
        what: impl FnOnce(&Node) -> Vec<u8>,
    ) -> Result<Answer, Error> {
        let path = Path::resolve(path, self.home(request.client)?)?;
        let Some(at) = request.transaction else {
            return self.tree.open(&path, &request.asker, Access::READ).map(|node| Answer::Now(what(node)));
        };
        let limits = self.limits(&request.asker);
        let open = self.open_transaction(at)?;
        if let Some((quota, usage)) = limits
            && (open.seen() >= quota.transaction_nodes as usize || usage.memory >= quota.memory)
        {
            return Err(Error::Space);
        }
        let before = open.bytes;
        let result = open.open(&path, &request.asker, aspect).map(|node| Answer::Now(what(node)));
        let more = (open.bytes - before) as u32;
        if let Some(usage) = self.usage_of(request.client) {
            usage.memory = usage.memory.saturating_add(more);
        }
        result
    }

    fn directory_part(&mut self, request: &Request<'_>) -> Result<Answer, Error> {
        let mut parts = strings(request.payload);
        let (path, offset) = parts.next().zip(parts.next()).ok_or(Error::Invalid)?;
        if parts.next().is_some() {
            return Err(Error::Invalid);
        }
        let offset = leading_number(offset);
        self.read(request, path, Aspect::Children, |node| {
            let mut reply = format!("{}\0", node.changed.max(node.listed)).into_bytes();
            let names = directory(node);
            let mut rest = names.get(offset..).unwrap_or(&[]);
            // Whole names, as many as fit beside the byte that says that these were the last.
            while let Ok((name, after)) = first_string(rest)
                && reply.len() + name.len() + 1 < PAYLOAD_MAX
            {
                reply.extend_from_slice(name);
                reply.push(0);
                rest = after;
            }
            if rest.is_empty() {
                reply.push(0);
            }
            reply
        })
    }

    fn change(
        &mut self,
        request: &Request<'_>,
        path: &[u8],
        change: impl FnOnce(Path) -> Change,
    ) -> Result<Answer, Error> {
        let path = Path::resolve(path, self.home(request.client)?)?;
        self.apply(change(path), &request.asker, request.transaction, request.now_ns)?;
        ok()
    }

    fn set_permissions(&mut self, request: &Request<'_>) -> Result<Answer, Error> {
        let (path, rest) = first_string(request.payload)?;
        let entries: Vec<Permission> = strings(rest).map(Permission::parse).collect::<Result<_, _>>()?;
        if entries.is_empty() {
            return Err(Error::Invalid);
        }
        if self.limits(&request.asker).is_some_and(|(quota, _)| entries.len() > quota.permissions as usize) {
            return Err(Error::Space);
        }
        let list = self.list(&entries)?;
        if !path.starts_with(b"@") {
            return self.change(request, path, |path| Change::Permit(path, list));
        }
        let special = match core::str::from_utf8(path) {
            Ok(INTRODUCE) => &mut self.introduce,
            Ok(RELEASE) => &mut self.release,
            _ => return Err(Error::Invalid),
        };
        if !special.owned_by(&request.asker) {
            return Err(Error::Access);
        }
        *special = list;
        ok()
    }

    /// The path of a watch as the index knows it, and how much of it its client does not see.
    fn watch_path(&self, client: ClientId, path: &[u8]) -> Result<(Arc<str>, usize), Error> {
        if path.starts_with(b"@") {
            let special = core::str::from_utf8(path).map_err(|_| Error::Invalid)?;
            return if special.len() > REL_PATH_MAX {
                Err(Error::Invalid)
            } else {
                Ok((Arc::from(special), 0))
            };
        }
        let home = self.home(client)?;
        let whole = Path::resolve(path, home)?;
        let hidden = if path.starts_with(b"/") { 0 } else { home.as_str().len() + 1 };
        Ok((Arc::from(whole.as_str()), hidden))
    }

    fn watch(&mut self, request: &Request<'_>) -> Result<Answer, Error> {
        let mut parts = strings(request.payload);
        let (path, token) = parts.next().zip(parts.next()).ok_or(Error::Invalid)?;
        let depth = match parts.next() {
            None | Some(b"") => None,
            Some(depth) => Some(number(depth)?),
        };
        if parts.next().is_some() {
            return Err(Error::Invalid);
        }
        let client = request.client;
        let (path, hidden) = self.watch_path(client, path)?;
        let token: Arc<[u8]> = Arc::from(token);
        let bytes = watch_bytes(&path, &token);
        let new = self
            .clients
            .get(&client)
            .is_some_and(|known| !known.watches.contains(&(path.clone(), token.clone())));
        if !new {
            return Err(Error::Exists);
        }
        if let Some((quota, usage)) = self.limits(&request.asker) {
            if usage.watches > quota.watches {
                return Err(Error::TooBig);
            }
            if usage.memory + bytes > quota.memory {
                return Err(Error::Memory);
            }
        }
        self.orders += 1;
        self.watches.add(&path, client, &token, Watch { hidden, depth, order: self.orders });
        if let Some(known) = self.clients.get_mut(&client) {
            known.watches.insert_mut((Arc::clone(&path), Arc::clone(&token)));
        }
        if let Some(usage) = self.usage_of(client) {
            usage.watches += 1;
            usage.memory += bytes;
        }
        Ok(Answer::Watching(payload(path.get(hidden..).unwrap_or(""), &token)))
    }

    fn unwatch(&mut self, request: &Request<'_>) -> Result<Answer, Error> {
        let mut parts = strings(request.payload);
        let (path, token) = parts.next().zip(parts.next()).ok_or(Error::Invalid)?;
        if parts.next().is_some() {
            return Err(Error::Invalid);
        }
        let client = request.client;
        let (path, _) = self.watch_path(client, path).map_err(|_| Error::NotFound)?;
        let key = (path, Arc::from(token));
        if !self.clients.get_mut(&client).is_some_and(|known| known.watches.remove_mut(&key)) {
            return Err(Error::NotFound);
        }
        self.watches.remove(&key.0, client, &key.1);
        if let Some(usage) = self.usage_of(client) {
            usage.watches = usage.watches.saturating_sub(1);
            usage.memory = usage.memory.saturating_sub(watch_bytes(&key.0, &key.1));
        }
        ok()
    }

    fn start(&mut self, request: &Request<'_>) -> Result<Answer, Error> {
        if request.transaction.is_some() {
            return Err(Error::Busy);
        }
        if self.limits(&request.asker).is_some_and(|(quota, usage)| usage.transactions > quota.transactions) {
            return Err(Error::Space);
        }
        self.orders += 1;
        let transaction = Transaction::new(&self.tree, self.orders, self.replaced);
        let known = self.clients.get_mut(&request.client).ok_or(Error::NotFound)?;
        let id = known.new_transaction_id();
        known.transactions.insert_mut(id, transaction);
        self.open.insert_mut(self.orders, (request.client, id));
        if let Some(usage) = self.usage_of(request.client) {
            usage.transactions += 1;
        }
        Ok(Answer::Now(format!("{id}\0").into_bytes()))
    }

    fn end(&mut self, request: &Request<'_>) -> Result<Answer, Error> {
        let keep = match only_string(request.payload)? {
            b"T" => true,
            b"F" => false,
            _ => return Err(Error::Invalid),
        };
        let (client, id) = request.transaction.ok_or(Error::NotFound)?;
        let known = self.clients.get_mut(&client).ok_or(Error::NotFound)?;
        let transaction = known.transactions.get(&id).cloned().ok_or(Error::NotFound)?;
        known.transactions.remove_mut(&id);
        self.forget_transaction(client, &transaction);
        self.probe();
        if !keep {
            return ok();
        }
        self.stamp += 1;
        let (tree, effects) =
            transaction.finish(&self.tree, |domain| self.life(domain), &request.asker, self.stamp)?;
        if let Some((quota, usage)) = self.limits(&request.asker) {
            let own = effects.accounts.iter().filter(|(life, ..)| *life == request.asker.life);
            let (nodes, bytes) = own.fold((0, 0), |sum, (_, nodes, bytes)| (sum.0 + nodes, sum.1 + bytes));
            if nodes > 0 && i64::from(usage.nodes) + nodes > i64::from(quota.nodes) {
                return Err(Error::Space);
            }
            if bytes > 0 && i64::from(usage.memory) + bytes > i64::from(quota.memory) {
                return Err(Error::Memory);
            }
        }
        self.tree = tree;
        self.probe();
        self.settle(effects, &request.asker, transaction.bytes, request.now_ns);
        ok()
    }

    fn introduced_domain(&self, text: &[u8]) -> Result<DomId, Error> {
        let domain = domain(text)?;
        if domain == DomId::ZERO {
            return Err(Error::Invalid);
        }
        if self.is_introduced(domain) { Ok(domain) } else { Err(Error::NotFound) }
    }

    fn release(&mut self, request: &Request<'_>) -> Result<Answer, Error> {
        let domain = self.introduced_domain(only_string(request.payload)?)?;
        // As far as the store goes it has ended. It exists still, so permissions may name it, but those from before are not its own.
        self.remove_domain(domain, request.now_ns);
        self.add_domain(domain, request.now_ns);
        Ok(Answer::With(OK.into(), Action::Release { domain }))
    }

    fn set_target(&mut self, request: &Request<'_>) -> Result<Answer, Error> {
        let mut parts = strings(request.payload);
        let (domain, target) = parts.next().zip(parts.next()).ok_or(Error::Invalid)?;
        let (domain, target) = (self.introduced_domain(domain)?, self.introduced_domain(target)?);
        let target = self.life(target);
        if let Some(known) = self.domains.get_mut(&domain) {
            known.target = Some(target);
        }
        ok()
    }
}

impl Client {
    fn new_transaction_id(&mut self) -> u32 {
        loop {
            let id = self.next_transaction;
            self.next_transaction = self.next_transaction.wrapping_add(1).max(1);
            if !self.transactions.contains_key(&id) {
                return id;
            }
        }
    }
}

fn introduce(request: &Request<'_>) -> Result<Answer, Error> {
    let mut parts = strings(request.payload);
    let (domain, port) = match (parts.next(), parts.next(), parts.next()) {
        // The frame's number says nothing: the ring is found by its reserved grant.
        (Some(text), Some(_), Some(port)) => (domain(text)?, number(port)?),
        _ => return Err(Error::Invalid),
    };
    if port == 0 || domain == DomId::ZERO || domain.get() >= DomId::FIRST_RESERVED.get() {
        return Err(Error::Invalid);
    }
    Ok(Answer::After(Action::Introduce { client: request.client, header: request.header, domain, port }))
}

/// The names of a node's children, each with a zero byte behind it.
fn directory(node: &Node) -> Vec<u8> {
    node.names().flat_map(|name| name.bytes().chain([0])).collect()
}

/// As C's `atoi` reads it for Xen's stores: digits in front count, no digits are 0, and what is negative or too large is behind every list.
fn leading_number(text: &[u8]) -> usize {
    let text = text.trim_ascii_start();
    let (negative, text) = match text.split_first() {
        Some((b'-', rest)) => (true, rest),
        Some((b'+', rest)) => (false, rest),
        _ => (false, text),
    };
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit());
    let value =
        digits.fold(0usize, |sum, digit| sum.saturating_mul(10).saturating_add((digit - b'0').into()));
    if negative && value != 0 { usize::MAX } else { value }
}

pub(super) fn number(text: &[u8]) -> Result<u32, Error> {
    let digits =
        core::str::from_utf8(text).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    digits.and_then(|digits| digits.parse().ok()).ok_or(Error::Invalid)
}
