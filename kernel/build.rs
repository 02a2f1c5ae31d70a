//! Linker arguments of the hypervisor image; the code generation flags live in xtask alone.

fn main() {
    let dir = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    println!("cargo:rerun-if-changed=hypervisor.ld");
    println!("cargo:rerun-if-changed=build.rs");
    for arg in ["-nostartfiles", "-nostdlib", "-static", "-no-pie"] {
        println!("cargo:rustc-link-arg-bins={arg}");
    }
    println!("cargo:rustc-link-arg-bins=-T{dir}/hypervisor.ld");
    for arg in ["-zmax-page-size=4096", "--build-id=none", "-znognustack", "--gc-sections"] {
        println!("cargo:rustc-link-arg-bins=-Wl,{arg}");
    }
}
