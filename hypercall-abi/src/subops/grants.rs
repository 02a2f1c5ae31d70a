//! Grant tables: the commands of `grant_table_op`.

use super::operations;

operations! {
    /// Commands of `grant_table_op(cmd, operations, count)`; the argument structs are in [`grant`](crate::grant).
    ///
    /// The command is in the low 12 bits; the 20 above must be clear, but for `cache_flush`. Of every command: `EINVAL` bits
    /// above the command, or a count above 2^31 - 1; `EFAULT` a list that begins in the hypervisor's part of the address space,
    /// even an empty one. A list that faults is done up to the element that cannot be read or answered.
    GnttabOp of GrantTableOp as grant, "GNTTABOP_", 32 bits, else ENOSYS {
        /// Maps granted frames.
        MapGrantRef = 0, "map_grant_ref", Guest, [Handled], {
            [takes InOut grant::GnttabMapGrantRef]
            [rules
                "The granter's entry is marked as in use before the mapping can be used; what the granter wrote before it made the entry valid is seen through the mapping.";
                "status -3: no such entry, or neither for devices nor for the CPU";
                "status -2: no such domain";
                "status -13: no handle is left";
                "status -9: the frame is not the granter's";
                "status -1: not granted so, 128 uses already, part of a page, no page-table entry, or the frame is no data";
            ]
        };
        /// Ends such mappings.
        UnmapGrantRef = 1, "unmap_grant_ref", Guest, [Handled], {
            [takes InOut grant::GnttabUnmapGrantRef]
            [rules
                "status -4: no such mapping";
                "status -6: not the address that the mapping has for devices";
                "status -1: the page-table entry is not the mapping's";
                "The granter sees the entry unused only when no processor translates to the frame any more.";
            ]
        };
        /// Sizes the table and lists its frames.
        SetupTable = 2, "setup_table", Guest, [Handled], {
            [takes InOut grant::GnttabSetupTable]
            [errors EINVAL "a count other than 1";]
            [rules
                "What the table has grown by stays, also when the list cannot be written.";
                "status -1: more frames than the limit, or no memory";
                "status -2: no such domain";
                "status -5: the list cannot be written";
                "status -8: another domain's, without rights over it";
            ]
        };
        /// Prints a table on the hypervisor's console.
        DumpTable = 3, "dump_table", Guest, [Refused ENOSYS], {
            [takes InOut grant::GnttabDumpTable]
        };
        /// Gives frames away.
        Transfer = 4, "transfer", Guest, [Handled], {
            [takes InOut grant::GnttabTransfer]
            [rules
                "status -9: not a frame of the caller's, or something refers to it; nothing has changed";
                "status -2: no such domain; the frame is lost";
                "status -1: the entry does not wait for a frame of the caller's, or the receiver may have no more; the frame is lost";
                "the receiver sets flags to accept_transfer, sees transfer_committed, and may read the frame once it sees transfer_completed";
            ]
        };
        /// Copies between own and granted frames.
        Copy = 5, "copy", Guest, [Handled], {
            [takes InOut grant::GnttabCopy]
            [rules
                "In order. A copy is not atomic: who reads or writes meanwhile sees a mixture.";
                "status -8: a frame by its number, but not of DOMID_SELF";
                "status -2: no such domain";
                "status -3: no such entry";
                "status -9: not a frame of that domain's";
                "status -10: past the end of a page";
                "status -1: not granted so, outside the part that is, through more than one other entry, or into what is no data";
            ]
        };
        /// Tells the table's size and limit.
        QuerySize = 6, "query_size", Guest, [Handled], {
            [takes InOut grant::GnttabQuerySize]
            [errors EINVAL "a count other than 1";]
            [rules
                "status -2: no such domain";
                "status -8: another domain's, without rights over it";
            ]
        };
        /// Ends a mapping and moves another one into its place.
        UnmapAndReplace = 7, "unmap_and_replace", Guest, [Handled], {
            [takes InOut grant::GnttabUnmapAndReplace]
            [rules
                "status -4: no such mapping";
                "status -1: mapped by machine address, no page-table entry, or one that is not the mapping's";
                "the entry that translates new_addr is empty afterwards, also when the mapping's entry turns out to be another";
                "a new_addr of 0 moves nothing";
            ]
        };
        /// Chooses the entry layout.
        SetVersion = 8, "set_version", Guest, [Handled], {
            [takes InOut grant::GnttabSetVersion]
            [errors
                EINVAL "neither 1 nor 2";
                EBUSY "an entry beyond the 8 reserved ones is in use, or a status frame is referred to that would go";
                EAGAIN "a copy by a reserved entry is under way";
                ERANGE "version 1 cannot express a reserved entry";
                ENOMEM "no memory for status frames";
            ]
            [rules "the reserved entries stay, the others are empty afterwards";]
        };
        /// Lists the frames of version 2's status words.
        GetStatusFrames = 9, "get_status_frames", Guest, [Handled], {
            [takes InOut grant::GnttabGetStatusFrames]
            [errors EINVAL "a count other than 1";]
            [rules
                "status -1: more than there are; version 1 has none";
                "status -2: no such domain";
                "status -5: the list cannot be written";
                "status -8: another domain's, without rights over it";
            ]
        };
        /// Tells the entry layout.
        GetVersion = 10, "get_version", Guest, [Handled], {
            [takes InOut grant::GnttabGetVersion]
            [errors ESRCH "no such domain"; EPERM "another domain's, without rights over it";]
        };
        /// Exchanges two entries.
        SwapGrantRef = 11, "swap_grant_ref", Guest, [Handled], {
            [takes InOut grant::GnttabSwapGrantRef]
            [rules
                "status -3: no such entry";
                "status -12: one of them is in use";
            ]
        };
        /// Cleans or invalidates caches of a granted range.
        CacheFlush = 12, "cache_flush", Guest, [Handled], {
            [takes InOut grant::GnttabCacheFlush]
            [errors
                EINVAL "past the end of a page, an unknown operation (naming an entry is one), no such frame, or another domain's that the caller does not use by a grant";
                EPERM "a frame that no domain owns";
                EOPNOTSUPP "to invalidate without writing back";
                EILSEQ "an empty range, but the command says where to go on";
            ]
            [rules "the first error ends the list";]
        };
    }
}
