//! Sizes and offsets of every struct that Xen's headers define, recorded as numbers and asserted at compile time.
//!
//! [`for_each_layout!`](crate::for_each_layout) hands the same table to `tests/abi-layout`, which asks a C compiler what the
//! headers say, so the numbers here are the headers' and not a copy of what Rust made of our structs.

/// Calls `$callback!` with one row per struct: `module::Type = "C type", size { field @ offset, field = "C field" @ offset };`.
///
/// Fields whose C name is not given have the same name there. Padding that has no name in C is not listed.
#[macro_export]
macro_rules! for_each_layout {
    ($callback:ident) => {
        $callback! {
            vcpu::VcpuTimeInfo = "struct vcpu_time_info", 32 {
                version @ 0, pad0 @ 4, tsc_timestamp @ 8, system_time @ 16, tsc_to_system_mul @ 24, tsc_shift @ 28,
                flags @ 29, pad1 @ 30
            };
            vcpu::ArchVcpuInfo = "struct arch_vcpu_info", 16 { cr2 @ 0, pad @ 8 };
            vcpu::VcpuInfo = "struct vcpu_info", 64 {
                evtchn_upcall_pending @ 0, evtchn_upcall_mask @ 1, evtchn_pending_sel @ 8, arch @ 16, time @ 32
            };
            vcpu::RunstateInfo = "struct vcpu_runstate_info", 48 { state @ 0, state_entry_time @ 8, time @ 16 };
            vcpu::CpuUserRegs = "struct cpu_user_regs", 200 {
                r15 @ 0, r14 @ 8, r13 @ 16, r12 @ 24, rbp @ 32, rbx @ 40, r11 @ 48, r10 @ 56, r9 @ 64, r8 @ 72, rax @ 80,
                rcx @ 88, rdx @ 96, rsi @ 104, rdi @ 112, error_code @ 120, entry_vector @ 124, rip @ 128, cs @ 136,
                saved_upcall_mask @ 140, rflags @ 144, rsp @ 152, ss @ 160, es @ 168, ds @ 176, fs @ 184, gs @ 192
            };
            vcpu::TrapInfo = "struct trap_info", 16 { vector @ 0, flags @ 1, cs @ 2, address @ 8 };
            vcpu::VcpuGuestContext = "struct vcpu_guest_context", 5168 {
                fpu_ctxt @ 0, flags @ 512, user_regs @ 520, trap_ctxt @ 720, ldt_base @ 4816, ldt_ents @ 4824,
                gdt_frames @ 4832, gdt_ents @ 4960, kernel_ss @ 4968, kernel_sp @ 4976, ctrlreg @ 4984, debugreg @ 5048,
                event_callback_eip @ 5112, failsafe_callback_eip @ 5120, syscall_callback_eip @ 5128, vm_assist @ 5136,
                fs_base @ 5144, gs_base_kernel @ 5152, gs_base_user @ 5160
            };
            vcpu::IretContext = "struct iret_context", 72 {
                rax @ 0, r11 @ 8, rcx @ 16, flags @ 24, rip @ 32, cs @ 40, rflags @ 48, rsp @ 56, ss @ 64
            };
            vcpu::VcpuSetPeriodicTimer = "struct vcpu_set_periodic_timer", 8 { period_ns @ 0 };
            vcpu::VcpuSetSingleshotTimer = "struct vcpu_set_singleshot_timer", 16 { timeout_abs_ns @ 0, flags @ 8 };
            vcpu::VcpuRegisterVcpuInfo = "struct vcpu_register_vcpu_info", 16 { mfn @ 0, offset @ 8, rsvd @ 12 };
            vcpu::VcpuRegisterRunstateMemoryArea = "struct vcpu_register_runstate_memory_area", 8 { addr @ 0 };
            vcpu::VcpuRegisterTimeMemoryArea = "struct vcpu_register_time_memory_area", 8 { addr @ 0 };
            vcpu::VcpuGetPhysid = "struct vcpu_get_physid", 8 { phys_id @ 0 };
            shared_info::ArchSharedInfo = "struct arch_shared_info", 48 {
                max_pfn @ 0, pfn_to_mfn_frame_list_list @ 8, nmi_reason @ 16, p2m_cr3 @ 24, p2m_vaddr @ 32,
                p2m_generation @ 40
            };
            shared_info::SharedInfo = "struct shared_info", 3136 {
                vcpu_info @ 0, evtchn_pending @ 2048, evtchn_mask @ 2560, wc_version @ 3072, wc_sec @ 3076,
                wc_nsec @ 3080, wc_sec_hi @ 3084, arch @ 3088
            };
            start_info::StartInfo = "struct start_info", 1168 {
                magic @ 0, nr_pages @ 32, shared_info @ 40, flags @ 48, store_mfn @ 56, store_evtchn @ 64, console @ 72,
                pt_base @ 88, nr_pt_frames @ 96, mfn_list @ 104, mod_start @ 112, mod_len @ 120, cmd_line @ 128,
                first_p2m_pfn @ 1152, nr_p2m_frames @ 1160
            };
            start_info::MultibootModule = "struct xen_multiboot_mod_list", 16 {
                mod_start @ 0, mod_end @ 4, cmdline @ 8, pad @ 12
            };
            callback::CallbackRegister = "struct callback_register", 16 { kind = "type" @ 0, flags @ 2, address @ 8 };
            callback::CallbackUnregister = "struct callback_unregister", 4 { kind = "type" @ 0, unused = "_unused" @ 2 };
            nmi::NmiCallback = "struct xennmi_callback", 16 { handler_address @ 0, pad @ 8 };
            mmu::MmuUpdate = "struct mmu_update", 16 { ptr @ 0, val @ 8 };
            mmu::MmuextOp = "struct mmuext_op", 24 { cmd @ 0, arg1 @ 8, arg2 @ 16 };
            mmu::MulticallEntry = "struct multicall_entry", 64 { op @ 0, result @ 8, args @ 16 };
            memory::MemoryReservation = "struct xen_memory_reservation", 32 {
                extent_start @ 0, nr_extents @ 8, extent_order @ 16, mem_flags @ 20, domid @ 24
            };
            memory::MemoryExchange = "struct xen_memory_exchange", 72 {
                input = "in" @ 0, output = "out" @ 32, nr_exchanged @ 64
            };
            memory::MemoryDomain = "struct xen_memory_domain", 2 { domid @ 0 };
            memory::MachphysMfnList = "struct xen_machphys_mfn_list", 24 {
                max_extents @ 0, extent_start @ 8, nr_extents @ 16
            };
            memory::MachphysMapping = "struct xen_machphys_mapping", 24 { v_start @ 0, v_end @ 8, max_mfn @ 16 };
            memory::MemoryMap = "struct xen_memory_map", 16 { nr_entries @ 0, buffer @ 8 };
            memory::ForeignMemoryMap = "struct xen_foreign_memory_map", 24 { domid @ 0, map @ 8 };
            memory::AddToPhysmap = "struct xen_add_to_physmap", 24 { domid @ 0, size @ 2, space @ 4, idx @ 8, gpfn @ 16 };
            memory::AddToPhysmapBatch = "struct xen_add_to_physmap_batch", 32 {
                domid @ 0, space @ 2, size @ 4, foreign_domid = "u.foreign_domid" @ 6, idxs @ 8, gpfns @ 16, errs @ 24
            };
            memory::RemoveFromPhysmap = "struct xen_remove_from_physmap", 16 { domid @ 0, gpfn @ 8 };
            memory::PodTarget = "struct xen_pod_target", 40 {
                target_pages @ 0, tot_pages @ 8, pod_cache_pages @ 16, pod_entries @ 24, domid @ 32
            };
            memory::AcquireResource = "struct xen_mem_acquire_resource", 32 {
                domid @ 0, kind = "type" @ 2, id @ 4, nr_frames @ 8, pad @ 12, frame @ 16, frame_list @ 24
            };
            memory::AccessOpArgument = "struct xen_mem_access_op", 32 {
 op @ 0, access @ 1, domid @ 2, nr @ 4, pfn @ 8, pfn_list @ 16, access_list @ 24
 };
            memory::VnumaTopologyInfo = "struct xen_vnuma_topology_info", 40 {
                domid @ 0, pad @ 2, nr_vnodes @ 4, nr_vcpus @ 8, nr_vmemranges @ 12, vdistance @ 16, vcpu_to_vnode @ 24, vmemrange @ 32
            };
            memory::ReservedDeviceMemory = "struct xen_reserved_device_memory", 16 { start_pfn @ 0, nr_pages @ 8 };
            memory::ReservedDeviceMemoryMap = "struct xen_reserved_device_memory_map", 24 {
                flags @ 0, nr_entries @ 4, buffer @ 8, device = "dev" @ 16
            };
            hvm::HvmParam = "struct xen_hvm_param", 16 { domid @ 0, index @ 4, value @ 8 };
            hvm::PagetableDying = "struct xen_hvm_pagetable_dying", 16 { domid @ 0, gpa @ 8 };
            hvm::Xentrace = "struct xen_hvm_xentrace", 32 { event @ 0, extra_bytes @ 2, extra @ 4 };
            hvm::GetMemType = "struct xen_hvm_get_mem_type", 16 { domid @ 0, mem_type @ 2, pfn @ 8 };
            hvm::DmOpBuffer = "struct xen_dm_op_buf", 16 { buffer = "h" @ 0, size @ 8 };
            physdev::PhysdevManagePciExt = "struct physdev_manage_pci_ext", 16 {
                bus @ 0, devfn @ 1, is_extfn @ 4, is_virtfn @ 8, physfn @ 12
            };
            physdev::PhysdevDbgpOp = "struct physdev_dbgp_op", 6 { op @ 0, bus @ 1, device = "u.pci" @ 2 };
            evtchn::EvtchnAllocUnbound = "struct evtchn_alloc_unbound", 8 { dom @ 0, remote_dom @ 2, port @ 4 };
            evtchn::EvtchnBindInterdomain = "struct evtchn_bind_interdomain", 12 {
                remote_dom @ 0, remote_port @ 4, local_port @ 8
            };
            evtchn::EvtchnBindVirq = "struct evtchn_bind_virq", 12 { virq @ 0, vcpu @ 4, port @ 8 };
            evtchn::EvtchnBindPirq = "struct evtchn_bind_pirq", 12 { pirq @ 0, flags @ 4, port @ 8 };
            evtchn::EvtchnBindIpi = "struct evtchn_bind_ipi", 8 { vcpu @ 0, port @ 4 };
            evtchn::EvtchnClose = "struct evtchn_close", 4 { port @ 0 };
            evtchn::EvtchnSend = "struct evtchn_send", 4 { port @ 0 };
            evtchn::EvtchnStatus = "struct evtchn_status", 24 {
                dom @ 0, port @ 4, status @ 8, vcpu @ 12, u0 = "u.pirq" @ 16, u1 = "u.interdomain.port" @ 20
            };
            evtchn::EvtchnBindVcpu = "struct evtchn_bind_vcpu", 8 { port @ 0, vcpu @ 4 };
            evtchn::EvtchnUnmask = "struct evtchn_unmask", 4 { port @ 0 };
            evtchn::EvtchnReset = "struct evtchn_reset", 2 { dom @ 0 };
            evtchn::EvtchnInitControl = "struct evtchn_init_control", 24 {
                control_gfn @ 0, offset @ 8, vcpu @ 12, link_bits @ 16, pad = "_pad" @ 17
            };
            evtchn::EvtchnExpandArray = "struct evtchn_expand_array", 8 { array_gfn @ 0 };
            evtchn::EvtchnSetPriority = "struct evtchn_set_priority", 8 { port @ 0, priority @ 4 };
            evtchn::EvtchnFifoControlBlock = "struct evtchn_fifo_control_block", 72 {
                ready @ 0, rsvd = "_rsvd" @ 4, head @ 8
            };
            grant::GrantEntryV1 = "struct grant_entry_v1", 8 { flags @ 0, domid @ 2, frame @ 4 };
            grant::GrantEntryHeader = "struct grant_entry_header", 4 { flags @ 0, domid @ 2 };
            grant::GrantEntryV2 = "union grant_entry_v2", 16 {
                hdr @ 0, page_off = "sub_page.page_off" @ 4, length = "sub_page.length" @ 6,
                frame = "sub_page.frame" @ 8
            };
            grant::GnttabMapGrantRef = "struct gnttab_map_grant_ref", 32 {
                host_addr @ 0, flags @ 8, gref = "ref" @ 12, dom @ 16, status @ 18, handle @ 20, dev_bus_addr @ 24
            };
            grant::GnttabUnmapGrantRef = "struct gnttab_unmap_grant_ref", 24 {
                host_addr @ 0, dev_bus_addr @ 8, handle @ 16, status @ 20
            };
            grant::GnttabSetupTable = "struct gnttab_setup_table", 24 {
                dom @ 0, nr_frames @ 4, status @ 8, frame_list @ 16
            };
            grant::GnttabDumpTable = "struct gnttab_dump_table", 4 { dom @ 0, status @ 2 };
            grant::GnttabTransfer = "struct gnttab_transfer", 24 { mfn @ 0, domid @ 8, gref = "ref" @ 12, status @ 16 };
            grant::GnttabCopyPtr = "struct gnttab_copy_ptr", 16 { u @ 0, domid @ 8, offset @ 10 };
            grant::GnttabCopy = "struct gnttab_copy", 40 { source @ 0, dest @ 16, len @ 32, flags @ 34, status @ 36 };
            grant::GnttabQuerySize = "struct gnttab_query_size", 16 {
                dom @ 0, nr_frames @ 4, max_nr_frames @ 8, status @ 12
            };
            grant::GnttabUnmapAndReplace = "struct gnttab_unmap_and_replace", 24 {
                host_addr @ 0, new_addr @ 8, handle @ 16, status @ 20
            };
            grant::GnttabSetVersion = "struct gnttab_set_version", 4 { version @ 0 };
            grant::GnttabGetStatusFrames = "struct gnttab_get_status_frames", 16 {
                nr_frames @ 0, dom @ 4, status @ 6, frame_list @ 8
            };
            grant::GnttabGetVersion = "struct gnttab_get_version", 8 { dom @ 0, pad @ 2, version @ 4 };
            grant::GnttabSwapGrantRef = "struct gnttab_swap_grant_ref", 12 { ref_a @ 0, ref_b @ 4, status @ 8 };
            grant::GnttabCacheFlush = "struct gnttab_cache_flush", 16 { a @ 0, offset @ 8, length @ 10, op @ 12 };
            sched::SchedShutdown = "struct sched_shutdown", 4 { reason @ 0 };
            sched::SchedPoll = "struct sched_poll", 24 { ports @ 0, nr_ports @ 8, timeout @ 16 };
            sched::SchedRemoteShutdown = "struct sched_remote_shutdown", 8 { domain_id @ 0, reason @ 4 };
            sched::SchedWatchdog = "struct sched_watchdog", 8 { id @ 0, timeout @ 4 };
            sched::SchedPinOverride = "struct sched_pin_override", 4 { pcpu @ 0 };
            version::CompileInfo = "struct xen_compile_info", 144 {
                compiler @ 0, compile_by @ 64, compile_domain @ 80, compile_date @ 112
            };
            version::PlatformParameters = "struct xen_platform_parameters", 8 { virt_start @ 0 };
            version::FeatureInfo = "struct xen_feature_info", 8 { submap_idx @ 0, submap @ 4 };
            physdev::PhysdevEoi = "struct physdev_eoi", 4 { irq @ 0 };
            physdev::PhysdevPirqEoiGmfn = "struct physdev_pirq_eoi_gmfn", 8 { gmfn @ 0 };
            physdev::PhysdevIrqStatusQuery = "struct physdev_irq_status_query", 8 { irq @ 0, flags @ 4 };
            physdev::PhysdevSetIopl = "struct physdev_set_iopl", 4 { iopl @ 0 };
            physdev::PhysdevSetIobitmap = "struct physdev_set_iobitmap", 16 { bitmap @ 0, nr_ports @ 8 };
            physdev::PhysdevApic = "struct physdev_apic", 16 { apic_physbase @ 0, reg @ 8, value @ 12 };
            physdev::PhysdevIrq = "struct physdev_irq", 8 { irq @ 0, vector @ 4 };
            physdev::PhysdevMapPirq = "struct physdev_map_pirq", 40 {
                domid @ 0, kind = "type" @ 4, index @ 8, pirq @ 12, bus @ 16, devfn @ 20, entry_nr @ 24, table_base @ 32
            };
            physdev::PhysdevUnmapPirq = "struct physdev_unmap_pirq", 8 { domid @ 0, pirq @ 4 };
            physdev::PhysdevManagePci = "struct physdev_manage_pci", 2 { bus @ 0, devfn @ 1 };
            physdev::PhysdevSetupGsi = "struct physdev_setup_gsi", 8 { gsi @ 0, triggering @ 4, polarity @ 5 };
            physdev::PhysdevGetFreePirq = "struct physdev_get_free_pirq", 8 { kind = "type" @ 0, pirq @ 4 };
            physdev::PhysdevPciMmcfgReserved = "struct physdev_pci_mmcfg_reserved", 16 {
                address @ 0, segment @ 8, start_bus @ 10, end_bus @ 11, flags @ 12
            };
            physdev::PhysdevPciDeviceAdd = "struct physdev_pci_device_add", 12 {
                seg @ 0, bus @ 2, devfn @ 3, flags @ 4, physfn @ 8
            };
            physdev::PhysdevPciDevice = "struct physdev_pci_device", 4 { seg @ 0, bus @ 2, devfn @ 3 };
            platform::Settime64 = "struct xenpf_settime64", 24 { secs @ 0, nsecs @ 8, mbz @ 12, system_time @ 16 };
            io::xenstore::XenstoreInterface = "struct xenstore_domain_interface", 2076 {
                req @ 0, rsp @ 1024, req_cons @ 2048, req_prod @ 2052, rsp_cons @ 2056, rsp_prod @ 2060,
                server_features @ 2064, connection @ 2068, error @ 2072
            };
            io::xenstore::MessageHeader = "struct xsd_sockmsg", 16 { kind = "type" @ 0, req_id @ 4, tx_id @ 8, len @ 12 };
            io::console::XenconsInterface = "struct xencons_interface", 3088 {
                input = "in" @ 0, out @ 1024, in_cons @ 3072, in_prod @ 3076, out_cons @ 3080, out_prod @ 3084
            };
            io::ring::RingHeader = "struct blkif_sring", 64 {
                req_prod @ 0, req_event @ 4, rsp_prod @ 8, rsp_event @ 12, private = "pvt.pvt_pad" @ 16,
                pad = "__pad" @ 20
            };
            io::blkif::BlkifSegment = "struct blkif_request_segment", 8 { gref @ 0, first_sect @ 4, last_sect @ 5 };
            io::blkif::BlkifRequest = "struct blkif_request", 112 {
                operation @ 0, nr_segments @ 1, handle @ 2, id @ 8, sector_number @ 16, seg @ 24
            };
            io::blkif::BlkifRequestDiscard = "struct blkif_request_discard", 32 {
                operation @ 0, flag @ 1, handle @ 2, id @ 8, sector_number @ 16, nr_sectors @ 24
            };
            io::blkif::BlkifRequestIndirect = "struct blkif_request_indirect", 64 {
                operation @ 0, indirect_op @ 1, nr_segments @ 2, id @ 8, sector_number @ 16, handle @ 24,
                indirect_grefs @ 28
            };
            io::blkif::BlkifResponse = "struct blkif_response", 16 { id @ 0, operation @ 8, status @ 10 };
            io::netif::NetifTxRequest = "struct netif_tx_request", 12 {
                gref @ 0, offset @ 4, flags @ 6, id @ 8, size @ 10
            };
            io::netif::NetifTxResponse = "struct netif_tx_response", 4 { id @ 0, status @ 2 };
            io::netif::NetifRxRequest = "struct netif_rx_request", 8 { id @ 0, pad @ 2, gref @ 4 };
            io::netif::NetifRxResponse = "struct netif_rx_response", 8 { id @ 0, offset @ 2, flags @ 4, status @ 6 };
            io::netif::NetifExtraInfo = "struct netif_extra_info", 8 { kind = "type" @ 0, flags @ 1, u @ 2 };
            io::netif::ControlRequest = "struct xen_netif_ctrl_request", 16 { id @ 0, kind = "type" @ 2, data @ 4 };
            io::netif::ControlResponse = "struct xen_netif_ctrl_response", 12 {
                id @ 0, kind = "type" @ 2, status @ 4, data @ 8
            };
            io::netif::ControlGref = "struct xen_netif_gref", 8 { gref = "ref" @ 0, flags @ 4, status @ 6 };
            version::BuildIdHeader = "struct xen_build_id", 4 { len @ 0 };
        }
    };
}

/// The same for Xen's control interface (feature `control`).
#[cfg(feature = "control")]
#[macro_export]
macro_rules! for_each_control_layout {
    ($callback:ident) => {
        $callback! {
            xen_control::Domctl = "struct xen_domctl", 144 {
                cmd @ 0, interface_version @ 4, domain @ 8, pad = "_pad" @ 10, payload = "u.pad" @ 16
            };
            xen_control::Sysctl = "struct xen_sysctl", 136 { cmd @ 0, interface_version @ 4, payload = "u.pad" @ 8 };
            xen_control::ArchDomainConfig = "struct xen_arch_domainconfig", 8 { emulation_flags @ 0, misc_flags @ 4 };
            xen_control::CreateDomain = "struct xen_domctl_createdomain", 64 {
                ssidref @ 0, handle @ 4, flags @ 20, iommu_opts @ 24, max_vcpus @ 28, max_evtchn_port @ 32,
                max_grant_frames @ 36, max_maptrack_frames @ 40, grant_opts @ 44, vmtrace_size @ 48, cpupool_id @ 52,
                arch @ 56
            };
            xen_control::GetDomainInfo = "struct xen_domctl_getdomaininfo", 112 {
                domain @ 0, pad1 @ 2, flags @ 4, tot_pages @ 8, max_pages @ 16, outstanding_pages @ 24, shr_pages @ 32,
                paged_pages @ 40, shared_info_frame @ 48, cpu_time @ 56, nr_online_vcpus @ 64, max_vcpu_id @ 68,
                ssidref @ 72, handle @ 76, cpupool @ 92, gpaddr_bits @ 96, pad2 @ 97, arch_config @ 104
            };
            xen_control::MaxMem = "struct xen_domctl_max_mem", 8 { max_memkb @ 0 };
            xen_control::VcpuContext = "struct xen_domctl_vcpucontext", 16 { vcpu @ 0, ctxt @ 8 };
            xen_control::GetVcpuInfo = "struct xen_domctl_getvcpuinfo", 24 {
                vcpu @ 0, online @ 4, blocked @ 5, running @ 6, cpu_time @ 8, cpu @ 16
            };
            xen_control::MaxVcpus = "struct xen_domctl_max_vcpus", 4 { max @ 0 };
            xen_control::SchedulerOp = "struct xen_domctl_scheduler_op", 24 {
                sched_id @ 0, cmd @ 4, weight = "u.credit2.weight" @ 8, cap = "u.credit2.cap" @ 10
            };
            xen_control::SchedId = "struct xen_sysctl_sched_id", 4 { sched_id @ 0 };
            xen_control::GetCpuInfo = "struct xen_sysctl_getcpuinfo", 24 { max_cpus @ 0, info @ 8, nr_cpus @ 16 };
            xen_control::HypercallInit = "struct xen_domctl_hypercall_init", 8 { gmfn @ 0 };
            xen_control::ReadConsole = "struct xen_sysctl_readconsole", 24 {
                clear @ 0, incremental @ 1, pad0 @ 2, pad1 @ 3, index @ 4, buffer @ 8, count @ 16
            };
            xen_control::PhysInfo = "struct xen_sysctl_physinfo", 112 {
                threads_per_core @ 0, cores_per_socket @ 4, nr_cpus @ 8, max_cpu_id @ 12, nr_nodes @ 16, max_node_id @ 20,
                cpu_khz @ 24, capabilities @ 28, arch_capabilities @ 32, pad @ 36, total_pages @ 40, free_pages @ 48,
                scrub_pages @ 56, outstanding_pages @ 64, max_mfn @ 72, hw_cap @ 80
            };
            xen_control::GetDomainInfoList = "struct xen_sysctl_getdomaininfolist", 24 {
                first_domain @ 0, max_domains @ 4, buffer @ 8, num_domains @ 16
            };
        }
    };
}

/// Whatever the hypervisor copies to a guest has no byte that nobody wrote: every structure is bytes through and through, its
/// padding named. The hypervisor's copying function asks for the same of its argument.
const fn no_hole<T: zerocopy::IntoBytes + zerocopy::FromBytes + zerocopy::Immutable>() {}

macro_rules! assert_layouts {
    ($($($module:ident)::+ = $c_type:literal, $size:literal {
        $($field:ident $(= $c_field:literal)? @ $offset:literal),* $(,)?
    };)*) => {
        $(
            const _: () = {
                use $crate::$($module)::+ as Type;
                no_hole::<Type>();
                assert!(size_of::<Type>() == $size, concat!($c_type, ": size"));
                $(assert!(
                    core::mem::offset_of!(Type, $field) == $offset,
                    concat!($c_type, ": offset of ", stringify!($field))
                );)*
            };
        )*
    };
}

for_each_layout!(assert_layouts);
#[cfg(feature = "control")]
for_each_control_layout!(assert_layouts);

const _: () = {
    assert!(size_of::<crate::memory::E820Entry>() == 20, "E820 entries are packed");
    assert!(size_of::<crate::start_info::Dom0ConsoleStart>() == size_of::<crate::start_info::ConsoleStart>());
    assert!(size_of::<crate::GuestHandle<u8>>() == 8);
    assert!(size_of::<crate::platform::PlatformHeader>() + 128 == crate::platform::PLATFORM_OP_SIZE);
};

#[cfg(feature = "control")]
const _: () = {
    assert!(size_of::<crate::control::ControlOp>() == 16 + crate::control::PAYLOAD_SIZE);
    assert!(core::mem::offset_of!(crate::control::ControlOp, payload) == 16);
    assert!(size_of::<crate::control::DomainInfo>() == 128);
    assert!(size_of::<crate::control::PhysInfo>() == 88);
};
