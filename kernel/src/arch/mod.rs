//! The machine: nearly all unsafe code and all assembly. Policy sees it through `hv::platform` alone.

pub mod x86_64;
