//! Grant tables: the commands of `grant_table_op`.

use super::operations;

operations! {
    /// Commands of `grant_table_op`; the argument structs are in [`grant`](crate::grant).
    GnttabOp of GrantTableOp, "GNTTABOP_", 32 bits, else ENOSYS {
        /// Maps granted frames.
        MapGrantRef = 0, "map_grant_ref", Guest, [Handled], {
            [takes InOut grant::GnttabMapGrantRef]
            [rules
                "The granter's entry is marked as in use before the mapping can be used; what the granter wrote before it made the entry valid is seen through the mapping.";
            ]
        };
        /// Ends such mappings.
        UnmapGrantRef = 1, "unmap_grant_ref", Guest, [Handled], {
            [takes InOut grant::GnttabUnmapGrantRef]
            [rules
                "The granter sees the entry unused only when no processor translates to the frame any more.";
            ]
        };
        /// Sizes the table and lists its frames.
        SetupTable = 2, "setup_table", Guest, [Handled], {
            [takes InOut grant::GnttabSetupTable]
            [errors
                EINVAL "a count other than 1";
            ]
            [rules
                "What the table has grown by stays, also when the list cannot be written.";
            ]
        };
        /// Prints a table on the hypervisor's console.
        DumpTable = 3, "dump_table", Guest, [Handled], {};
        /// Gives frames away.
        Transfer = 4, "transfer", Guest, [Handled], {
            [takes InOut grant::GnttabTransfer]
        };
        /// Copies between own and granted frames.
        Copy = 5, "copy", Guest, [Handled], {
            [takes InOut grant::GnttabCopy]
            [rules
                "In order. A copy is not atomic: who reads or writes meanwhile sees a mixture.";
            ]
        };
        /// Tells the table's size and limit.
        QuerySize = 6, "query_size", Guest, [Handled], {
            [takes InOut grant::GnttabQuerySize]
            [errors
                EINVAL "a count other than 1";
            ]
        };
        /// Ends a mapping and moves another one into its place.
        UnmapAndReplace = 7, "unmap_and_replace", Guest, [Handled], {
            [takes InOut grant::GnttabUnmapAndReplace]
        };
        /// Chooses the entry layout.
        SetVersion = 8, "set_version", Guest, [Handled], {
            [takes InOut grant::GnttabSetVersion]
            [errors
                EINVAL "a version of nobody";
            ]
        };
        /// Lists the frames of version 2's status words.
        GetStatusFrames = 9, "get_status_frames", Guest, [Handled], {
            [takes InOut grant::GnttabGetStatusFrames]
            [errors
                EINVAL "a count other than 1";
            ]
        };
        /// Tells the entry layout.
        GetVersion = 10, "get_version", Guest, [Handled], {
            [takes InOut grant::GnttabGetVersion]
            [errors
                ESRCH "there is no such domain";
                EPERM "another domain over which the caller has no control";
            ]
        };
        /// Exchanges two entries.
        SwapGrantRef = 11, "swap_grant_ref", Guest, [Handled], {
            [takes InOut grant::GnttabSwapGrantRef]
            [rules
                "Entries that are in use are not swapped.";
            ]
        };
        /// Cleans or invalidates caches of a granted range.
        CacheFlush = 12, "cache_flush", Guest, [Handled], {
            [takes InOut grant::GnttabCacheFlush]
        };
    }
}
