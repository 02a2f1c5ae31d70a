//! References to frames as values.
//!
//! A [`PageRef`] is one general reference, a [`TypedRef`] one general and one type reference. They cannot be copied; dropping
//! one gives it back, which is constant work. Where a reference must live in memory (a page-table entry, a vCPU's root, a
//! grant mapping) it is handed over with `into_pte` and comes back with `from_pte`: no other doors exist.
#![forbid(unsafe_code)]

use core::marker::PhantomData;
use core::mem;

use hypercall_abi::Mfn;

use crate::mm::{Event, Kind, Memory, Refusal};

/// One general reference: the frame keeps its owner while this exists.
#[must_use = "an unused reference is given back at once"]
pub struct PageRef<'a> {
    memory: &'a Memory,
    mfn: Mfn,
}

impl<'a> PageRef<'a> {
    /// Wraps a count that was just taken.
    pub(crate) fn from_count(memory: &'a Memory, mfn: Mfn) -> PageRef<'a> {
        PageRef { memory, mfn }
    }

    /// The frame.
    pub fn mfn(&self) -> Mfn {
        self.mfn
    }

    /// The table of all frames that it is in.
    pub fn memory(&self) -> &'a Memory {
        self.memory
    }

    /// Number of the domain that owns the frame.
    pub fn owner_number(&self) -> u16 {
        self.memory.owner_number(self.mfn)
    }

    /// Hands the reference over to an entry, or to whatever else stores the frame number.
    pub fn into_pte(self) -> Mfn {
        let mfn = self.mfn;
        self.forget();
        mfn
    }

    /// Takes the reference back that [`PageRef::into_pte`] stored. The caller has removed it from where it was.
    pub(crate) fn from_pte(memory: &'a Memory, mfn: Mfn) -> PageRef<'a> {
        PageRef { memory, mfn }
    }

    /// The count was taken away by other means.
    pub(crate) fn forget(self) {
        mem::forget(self);
    }

    /// Adds a reference of a kind that needs no check of the content. The debt is for translations that allowed more.
    #[inline(always)]
    pub fn typed<K: PlainKind>(
        self,
    ) -> Result<(TypedRef<'a, K>, crate::mm::TlbDebt), (PageRef<'a>, Refusal)> {
        match self.memory.type_step_of_known(self.mfn, Event::Get(K::KIND)) {
            Ok(effects) => {
                let debt = match effects.retyped {
                    Some((_, stamp)) => self.memory.owed_since(stamp),
                    None => crate::mm::TlbDebt::NONE,
                };
                Ok((TypedRef { page: self, kind: PhantomData }, debt))
            }
            Err(refusal) => Err((self, refusal)),
        }
    }
}

impl Drop for PageRef<'_> {
    fn drop(&mut self) {
        self.memory.put_general(self.mfn);
    }
}

/// A kind of frame, as a type.
pub trait FrameKind {
    /// The kind.
    const KIND: Kind;
}

/// A kind that any content fits.
pub trait PlainKind: FrameKind {}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident),*) => {$(
        $(#[$doc])*
        pub enum $name {}
        impl FrameKind for $name {
            const KIND: Kind = Kind::$name;
        }
    )*};
}

kinds! {
    /// An L1 page table.
    L1,
    /// An L2 page table.
    L2,
    /// An L3 page table.
    L3,
    /// A root page table.
    L4,
    /// A page of descriptors.
    SegDesc,
    /// A frame that is written.
    Writable
}

impl PlainKind for Writable {}

/// One general and one type reference: the frame keeps its owner and is nothing but a `K` while this exists.
///
/// Dropping the last reference to a page table does not tear it down, which could take long: the table is left parked, and
/// whoever needs the frame next, or the domain's teardown, finishes the work. `Pager::release` does it in steps.
#[must_use = "an unused reference is given back at once"]
pub struct TypedRef<'a, K: FrameKind> {
    page: PageRef<'a>,
    kind: PhantomData<K>,
}

impl<'a, K: FrameKind> TypedRef<'a, K> {
    /// Wraps counts that were just taken, or takes them back from where [`TypedRef::into_pte`] stored them.
    pub(crate) fn from_pte(memory: &'a Memory, mfn: Mfn) -> TypedRef<'a, K> {
        TypedRef { page: PageRef::from_pte(memory, mfn), kind: PhantomData }
    }

    /// The frame.
    pub fn mfn(&self) -> Mfn {
        self.page.mfn
    }

    /// Hands both references over to an entry, or to whatever else stores the frame number.
    pub fn into_pte(self) -> Mfn {
        let mfn = self.page.mfn;
        mem::forget(self);
        mfn
    }
}

impl<K: FrameKind> Drop for TypedRef<'_, K> {
    fn drop(&mut self) {
        self.page.memory.put_type_parking(self.page.mfn);
    }
}

// Neither is Clone (nor Copy): with an implementation, the call below would be ambiguous and not compile.
const _: () = {
    trait NotClone<A> {
        fn check() {}
    }
    struct IsClone;
    impl<T: ?Sized> NotClone<()> for T {}
    impl<T: Clone> NotClone<IsClone> for T {}
    let _ = <PageRef<'static> as NotClone<_>>::check;
    let _ = <TypedRef<'static, L4> as NotClone<_>>::check;
};
