//! Links dom0 with a larger stack than other guests have (guest-sdk/guest.ld): what looks into a file system keeps whole names there.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bins=-Wl,--defsym=__stack_size=0x40000");
}
