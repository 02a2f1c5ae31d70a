//! Grant tables: the commands of `grant_table_op`.

use super::operations;

operations! {
    /// Commands of `grant_table_op`; the argument structs are in [`grant`](crate::grant).
    GnttabOp of GrantTableOp, "GNTTABOP_", 32 bits, else ENOSYS {
        /// Maps granted frames.
        MapGrantRef = 0, "map_grant_ref", Guest, [Handled], {};
        /// Ends such mappings.
        UnmapGrantRef = 1, "unmap_grant_ref", Guest, [Handled], {};
        /// Sizes the table and lists its frames.
        SetupTable = 2, "setup_table", Guest, [Handled], {};
        /// Prints a table on the hypervisor's console.
        DumpTable = 3, "dump_table", Guest, [Handled], {};
        /// Gives frames away.
        Transfer = 4, "transfer", Guest, [Handled], {};
        /// Copies between own and granted frames.
        Copy = 5, "copy", Guest, [Handled], {};
        /// Tells the table's size and limit.
        QuerySize = 6, "query_size", Guest, [Handled], {};
        /// Ends a mapping and moves another one into its place.
        UnmapAndReplace = 7, "unmap_and_replace", Guest, [Handled], {};
        /// Chooses the entry layout.
        SetVersion = 8, "set_version", Guest, [Handled], {};
        /// Lists the frames of version 2's status words.
        GetStatusFrames = 9, "get_status_frames", Guest, [Handled], {};
        /// Tells the entry layout.
        GetVersion = 10, "get_version", Guest, [Handled], {};
        /// Exchanges two entries.
        SwapGrantRef = 11, "swap_grant_ref", Guest, [Handled], {};
        /// Cleans or invalidates caches of a granted range.
        CacheFlush = 12, "cache_flush", Guest, [Handled], {};
    }
}
