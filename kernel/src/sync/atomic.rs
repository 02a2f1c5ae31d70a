//! The atomics of protocols that are modelled: the processor's, or in a model (`--cfg loom`, tests only) loom's.
//!
//! loom runs code under every order of accesses and every value that the memory model lets a load return. It takes sequentially
//! consistent accesses for weaker than they are, but knows sequentially consistent fences; so here such a store is followed by one,
//! and such an exchange lies between two, which is what x86 does and no more.
//!
//! In a model each access can be made *relaxed* by its place in the source (`model::needed`): that finds the orders which a protocol
//! needs, since without them its model fails.

#[cfg(not(all(loom, test)))]
pub use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
#[cfg(all(loom, test))]
pub use model::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

#[cfg(all(loom, test))]
pub mod model {
    use alloc::collections::BTreeSet;
    use alloc::string::String;
    use alloc::vec::Vec;
    use core::panic::Location;
    use loom::sync::atomic as modelled;
    pub use loom::sync::atomic::Ordering;
    use std::sync::Mutex;

    /// A line of the source.
    type Place = (&'static str, u32);

    /// Which accesses are relaxed.
    #[derive(Clone, Copy, PartialEq)]
    enum Weak {
        None,
        One(Place),
        All,
    }

    /// Places of accesses that were made, and what is relaxed.
    struct Places {
        seen: BTreeSet<Place>,
        weak: Weak,
    }

    static PLACES: Mutex<Places> = Mutex::new(Places { seen: BTreeSet::new(), weak: Weak::None });

    fn places() -> std::sync::MutexGuard<'static, Places> {
        // A model that fails may do so with the lock held.
        PLACES.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The order in which an access is made.
    fn order(at: &'static Location<'static>, order: Ordering) -> Ordering {
        let place = (at.file(), at.line());
        let mut places = places();
        places.seen.insert(place);
        let weak = match places.weak {
            Weak::None => false,
            Weak::One(one) => one == place,
            Weak::All => true,
        };
        if weak { Ordering::Relaxed } else { order }
    }

    /// As core's; relaxed it is none.
    #[track_caller]
    pub fn fence(o: Ordering) {
        if order(Location::caller(), o) != Ordering::Relaxed {
            modelled::fence(o);
        }
    }

    fn explore(weak: Weak, model: fn()) {
        places().weak = weak;
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(2);
        builder.max_branches = 2_000;
        builder.check(model);
    }

    fn fails(weak: Weak, model: fn()) -> bool {
        let failed = std::panic::catch_unwind(|| explore(weak, model)).is_err();
        places().weak = Weak::None;
        failed
    }

    /// Explores `model` as it is: then it must hold. Then with all accesses relaxed: then it must not, or it shows nothing. Then
    /// with each access in `file` relaxed alone: returns the source lines of those without whose order it does not hold. (Of two that
    /// make up for each other neither is among them.)
    ///
    /// # Panics
    /// When one of the musts is not so.
    pub fn needed(file: &str, source: &str, model: fn()) -> Vec<String> {
        // One model at a time: what is relaxed is for all.
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        explore(Weak::None, model);
        let seen = places().seen.clone();
        assert!(fails(Weak::All, model), "it holds without any order");
        let here = seen.into_iter().filter(|(name, _)| name.ends_with(file));
        let needed = here.filter(|place| fails(Weak::One(*place), model));
        needed.map(|(_, line)| source.lines().nth(line as usize - 1).unwrap_or("").trim().into()).collect()
    }

    macro_rules! atomic {
        ($name:ident, $value:ty, $($exchange:ident)*) => {
            /// As core's.
            #[derive(Debug)]
            pub struct $name(modelled::$name);

            impl $name {
                pub fn new(value: $value) -> Self {
                    Self(modelled::$name::new(value))
                }
                #[track_caller]
                pub fn load(&self, o: Ordering) -> $value {
                    match order(Location::caller(), o) {
                        Ordering::SeqCst => self.0.load(Ordering::Acquire),
                        other => self.0.load(other),
                    }
                }
                #[track_caller]
                pub fn store(&self, value: $value, o: Ordering) {
                    match order(Location::caller(), o) {
                        Ordering::SeqCst => {
                            self.0.store(value, Ordering::Release);
                            modelled::fence(Ordering::SeqCst);
                        }
                        other => self.0.store(value, other),
                    }
                }
                $(
                    #[track_caller]
                    pub fn $exchange(&self, value: $value, o: Ordering) -> $value {
                        self.exchange(order(Location::caller(), o), |word, o| word.$exchange(value, o))
                    }
                )*
                #[track_caller]
                pub fn compare_exchange(
                    &self,
                    old: $value,
                    new: $value,
                    o: Ordering,
                    failed: Ordering,
                ) -> Result<$value, $value> {
                    let o = order(Location::caller(), o);
                    let failed = if o == Ordering::Relaxed { o } else { failed };
                    self.exchange(o, |word, o| word.compare_exchange(old, new, o, failed))
                }
                /// Never fails for nothing: that would only be one more round.
                #[track_caller]
                pub fn compare_exchange_weak(
                    &self,
                    old: $value,
                    new: $value,
                    o: Ordering,
                    failed: Ordering,
                ) -> Result<$value, $value> {
                    self.compare_exchange(old, new, o, failed)
                }
                #[track_caller]
                pub fn fetch_update(
                    &self,
                    o: Ordering,
                    failed: Ordering,
                    mut next: impl FnMut($value) -> Option<$value>,
                ) -> Result<$value, $value> {
                    let o = order(Location::caller(), o);
                    let failed = if o == Ordering::Relaxed { o } else { failed };
                    let mut old = self.0.load(failed);
                    while let Some(new) = next(old) {
                        match self.exchange(o, |word, o| word.compare_exchange(old, new, o, failed)) {
                            Ok(_) => return Ok(old),
                            Err(now) => old = now,
                        }
                    }
                    Err(old)
                }
                fn exchange<T>(&self, o: Ordering, act: impl FnOnce(&modelled::$name, Ordering) -> T) -> T {
                    if o != Ordering::SeqCst {
                        return act(&self.0, o);
                    }
                    modelled::fence(Ordering::SeqCst);
                    let before = act(&self.0, Ordering::AcqRel);
                    modelled::fence(Ordering::SeqCst);
                    before
                }
            }
        };
    }
    atomic!(AtomicBool, bool, swap);
    atomic!(AtomicU32, u32, swap fetch_add fetch_sub fetch_or fetch_and fetch_xor fetch_max);
    atomic!(AtomicU64, u64, swap fetch_add fetch_sub fetch_or fetch_and fetch_xor fetch_max);
    atomic!(AtomicUsize, usize, swap fetch_add fetch_sub);
}
