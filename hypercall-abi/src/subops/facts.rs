//! Facts about the hypervisor: the commands of `xen_version`.

use super::operations;

operations! {
    /// Commands of `xen_version`; the results are in [`version`](crate::version).
    VersionOp of XenVersion as version, "XENVER_", 32 bits, else ENOSYS {
        /// Returns major << 16 | minor.
        Version = 0, "version", Guest, [Handled], {
            [returns "major << 16 | minor"]
            [rules
                "Guests also use it to have pending events delivered: the way back from any call does that.";
            ]
        };
        /// The text after the numbers.
        Extraversion = 1, "extraversion", Guest, [Handled], {
            [value "address of 16 bytes of text"]
        };
        /// Compiler, builder and date.
        CompileInfo = 2, "compile_info", Guest, [Handled], {
            [takes Out version::CompileInfo]
        };
        /// Guest kinds it can run.
        Capabilities = 3, "capabilities", Guest, [Handled], {
            [value "address of 1024 bytes of text"]
        };
        /// Source revision.
        Changeset = 4, "changeset", Guest, [Handled], {
            [value "address of 64 bytes of text"]
        };
        /// Where the hypervisor's address range begins.
        PlatformParameters = 5, "platform_parameters", Guest, [Handled], {
            [takes Out version::PlatformParameters]
        };
        /// Feature bits, 32 per submap.
        GetFeatures = 6, "get_features", Guest, [Handled], {
            [takes InOut version::FeatureInfo]
            [errors
                EINVAL "a submap other than 0";
            ]
        };
        /// Returns the page size.
        Pagesize = 7, "pagesize", Guest, [Handled], {
            [value "null"]
            [returns "4096"]
            [errors
                EINVAL "an argument that is not null";
            ]
        };
        /// The domain's 16-byte handle.
        GuestHandle = 8, "guest_handle", Guest, [Handled], {
            [value "address of 16 bytes"]
        };
        /// The hypervisor's command line, privileged.
        Commandline = 9, "commandline", Guest, [Handled], {
            [value "address of 1024 bytes of text"]
        };
        /// The build identifier.
        BuildId = 10, "build_id", Guest, [Handled], {
            [value "null to ask for the length, or the address of a length and a buffer"]
            [errors
                EPERM "the caller has no control verbs";
                EINVAL "it has, and gives no room";
                ENODATA "it has; builds are named by their version alone";
            ]
        };
    }
}
