//! Links dom0 (guest-sdk/guest.ld) with a larger stack than other guests have: what looks into a file system keeps whole names there. It
//! lies at addresses of its own, so that one tells whether it is dom0's or a guest's.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bins=-Wl,--defsym=__stack_size=0x40000");
    println!("cargo::rustc-link-arg-bins=-Wl,--defsym=__base=0x40000000");
}
