//! Facts about the hypervisor: the commands of `xen_version`.

use super::operations;

operations! {
    /// Commands of `xen_version`; the results are in [`version`](crate::version).
    VersionOp of XenVersion, "XENVER_", 32 bits, else ENOSYS {
        /// Returns major << 16 | minor.
        Version = 0, "version", Guest, [Handled], {};
        /// The text after the numbers.
        Extraversion = 1, "extraversion", Guest, [Handled], {};
        /// Compiler, builder and date.
        CompileInfo = 2, "compile_info", Guest, [Handled], {};
        /// Guest kinds it can run.
        Capabilities = 3, "capabilities", Guest, [Handled], {};
        /// Source revision.
        Changeset = 4, "changeset", Guest, [Handled], {};
        /// Where the hypervisor's address range begins.
        PlatformParameters = 5, "platform_parameters", Guest, [Handled], {};
        /// Feature bits, 32 per submap.
        GetFeatures = 6, "get_features", Guest, [Handled], {};
        /// Returns the page size.
        Pagesize = 7, "pagesize", Guest, [Handled], {};
        /// The domain's 16-byte handle.
        GuestHandle = 8, "guest_handle", Guest, [Handled], {};
        /// The hypervisor's command line, privileged.
        Commandline = 9, "commandline", Guest, [Handled], {};
        /// The build identifier.
        BuildId = 10, "build_id", Guest, [Handled], {};
    }
}
