//! Constants and command numbers.

use hypercall_abi::grant::{GrantFlags, MapFlags};
use hypercall_abi::io::netif::{HashTypes, RxFlags, TxFlags};
use hypercall_abi::io::{blkif, netif, ring, xenbus, xenstore};
use hypercall_abi::mmu;
use hypercall_abi::nmi::NmiReason;
use hypercall_abi::start_info::{self, StartFlags};
use hypercall_abi::vcpu::{self, PvclockFlags, VcpuContextFlags};
use hypercall_abi::version::{self, Features};
use hypercall_abi::{
    DomId, Errno, Hypercall, Virq, callback, elfnote, evtchn, grant, hvm, memory, physdev, platform, sched,
    segment, shared_info, subops, xen_control, xen_header,
};

use core::mem::offset_of;

use zerocopy::IntoBytes;

use crate::Fact;

/// Facts of command enums, whose names are the C names.
macro_rules! commands {
    ($facts:ident: $($enum:path),* $(,)?) => {{
        $({
            use $enum as Command;
            for command in Command::ALL {
                $facts.push(Fact::new(command.name(), command.number()));
            }
        })*
    }};
}

/// Facts of constants: `C_NAME = our expression`.
macro_rules! values {
    ($facts:ident: $($c:ident = $ours:expr),* $(,)?) => {
        $($facts.push(Fact::new(stringify!($c), i128::from($ours)));)*
    };
}

/// Every constant that the headers define and our crate has.
#[must_use]
pub fn constants() -> Vec<Fact> {
    let mut facts = Vec::new();
    for call in Hypercall::ALL {
        facts.push(Fact::new(format!("__HYPERVISOR_{}", call.name()), call.number()));
    }
    for number in 1..4096 {
        // Read back from what a hypercall would return, the only door to an error number.
        let Err(error) = Errno::check((-i64::from(number)) as u64) else { continue };
        // The header has these two for the hypervisor only.
        if !["?", "EINTR", "ERESTART"].contains(&error.name()) {
            facts.push(Fact::new(format!("XEN_{}", error.name()), error.number()));
        }
    }
    for command in subops::EvtchnOp::ALL {
        // The header has this one for the hypervisor only.
        if *command != subops::EvtchnOp::ResetCont {
            facts.push(Fact::new(command.name(), command.number()));
        }
    }
    commands!(facts:
        subops::MmuextCmd, subops::GnttabOp, subops::MemoryOp, subops::SchedOp, subops::VcpuOp, subops::PhysdevOp,
        subops::CallbackOp, subops::CallbackType, subops::VersionOp, subops::ConsoleIoOp, subops::NmiOp, subops::VmAssistCmd,
        subops::VmAssist, subops::SegmentBase, sched::ShutdownReason, platform::PlatformOp, elfnote::ElfNote, blkif::BlkifOp,
        xenbus::XenbusState, xenstore::MessageType, netif::ControlType, subops::FlaskOp, subops::XenoprofOp, subops::HvmOp,
        subops::KexecOp, subops::ArgoOp, subops::XenpmuOp, subops::DmOp, subops::HypfsOp, subops::McaOp, subops::MmuCommand,
        xen_control::DomctlCmd, xen_control::SysctlCmd,
    );
    domains_and_memory(&mut facts);
    cpu(&mut facts);
    channels_and_grants(&mut facts);
    devices(&mut facts);
    control(&mut facts);
    facts
}

fn domains_and_memory(facts: &mut Vec<Fact>) {
    values!(facts:
        DOMID_FIRST_RESERVED = DomId::FIRST_RESERVED.get(), DOMID_SELF = DomId::SELF.get(), DOMID_IO = DomId::IO.get(),
        DOMID_XEN = DomId::XEN.get(), DOMID_COW = DomId::COW.get(), DOMID_INVALID = DomId::INVALID.get(),
        DOMID_IDLE = DomId::IDLE.get(),
        VIRQ_TIMER = Virq::TIMER.get(), VIRQ_DEBUG = Virq::DEBUG.get(), VIRQ_CONSOLE = Virq::CONSOLE.get(),
        VIRQ_DOM_EXC = Virq::DOM_EXC.get(), VIRQ_TBUF = Virq::TBUF.get(), VIRQ_DEBUGGER = Virq::DEBUGGER.get(),
        VIRQ_XENOPROF = Virq::XENOPROF.get(), VIRQ_CON_RING = Virq::CON_RING.get(), VIRQ_PCPU_STATE = Virq::PCPU_STATE.get(),
        VIRQ_MEM_EVENT = Virq::MEM_EVENT.get(), VIRQ_ARGO = Virq::ARGO.get(), VIRQ_ENOMEM = Virq::ENOMEM.get(),
        VIRQ_XENPMU = Virq::XENPMU.get(), NR_VIRQS = Virq::COUNT,
        UVMF_NONE = mmu::UVMF_NONE, UVMF_TLB_FLUSH = mmu::UVMF_TLB_FLUSH, UVMF_INVLPG = mmu::UVMF_INVLPG,
        UVMF_FLUSHTYPE_MASK = mmu::UVMF_FLUSHTYPE_MASK, UVMF_MULTI = mmu::UVMF_MULTI, UVMF_LOCAL = mmu::UVMF_LOCAL,
        UVMF_ALL = mmu::UVMF_ALL,
        XENMEMF_populate_on_demand = memory::XENMEMF_POPULATE_ON_DEMAND,
        XENMEMF_exact_node_request = memory::XENMEMF_EXACT_NODE_REQUEST, XENMEMF_vnode = memory::XENMEMF_VNODE,
        XENMAPSPACE_shared_info = memory::XENMAPSPACE_SHARED_INFO, XENMAPSPACE_grant_table = memory::XENMAPSPACE_GRANT_TABLE,
        XENMAPSPACE_gmfn = memory::XENMAPSPACE_GMFN, XENMAPSPACE_gmfn_range = memory::XENMAPSPACE_GMFN_RANGE,
        XENMAPSPACE_gmfn_foreign = memory::XENMAPSPACE_GMFN_FOREIGN,
        XENMAPIDX_grant_table_status = memory::XENMAPIDX_GRANT_TABLE_STATUS,
        XENMEM_resource_ioreq_server = memory::XENMEM_RESOURCE_IOREQ_SERVER,
        XENMEM_resource_grant_table = memory::XENMEM_RESOURCE_GRANT_TABLE,
        XENMEM_resource_vmtrace_buf = memory::XENMEM_RESOURCE_VMTRACE_BUF,
        XENMEM_resource_grant_table_id_shared = memory::XENMEM_RESOURCE_GRANT_TABLE_ID_SHARED,
        XENMEM_resource_grant_table_id_status = memory::XENMEM_RESOURCE_GRANT_TABLE_ID_STATUS,
    );
    facts.push(Fact::new("XENMEMF_get_address_bits(~0u)", memory::XENMEMF_ADDRESS_BITS_MASK));
    facts.push(Fact::new("SIF_PM_MASK", StartFlags::PM_MASK.bits()));
    facts.push(Fact::new("MAX_GUEST_CMDLINE", start_info::MAX_GUEST_CMDLINE as i128));
    values!(facts:
        SIF_PRIVILEGED = StartFlags::PRIVILEGED.bits(), SIF_INITDOMAIN = StartFlags::INITDOMAIN.bits(),
        SIF_MULTIBOOT_MOD = StartFlags::MULTIBOOT_MOD.bits(), SIF_MOD_START_PFN = StartFlags::MOD_START_PFN.bits(),
        SIF_VIRT_P2M_4TOOLS = StartFlags::VIRT_P2M_4TOOLS.bits(),
    );
    let feature = |bit: Features| i128::from(bit.bits().trailing_zeros());
    values!(facts:
        XENFEAT_writable_page_tables = feature(Features::WRITABLE_PAGE_TABLES),
        XENFEAT_writable_descriptor_tables = feature(Features::WRITABLE_DESCRIPTOR_TABLES),
        XENFEAT_auto_translated_physmap = feature(Features::AUTO_TRANSLATED_PHYSMAP),
        XENFEAT_supervisor_mode_kernel = feature(Features::SUPERVISOR_MODE_KERNEL),
        XENFEAT_pae_pgdir_above_4gb = feature(Features::PAE_PGDIR_ABOVE_4GB),
        XENFEAT_mmu_pt_update_preserve_ad = feature(Features::MMU_PT_UPDATE_PRESERVE_AD),
        XENFEAT_highmem_assist = feature(Features::HIGHMEM_ASSIST),
        XENFEAT_gnttab_map_avail_bits = feature(Features::GNTTAB_MAP_AVAIL_BITS),
        XENFEAT_hvm_callback_vector = feature(Features::HVM_CALLBACK_VECTOR),
        XENFEAT_hvm_safe_pvclock = feature(Features::HVM_SAFE_PVCLOCK), XENFEAT_hvm_pirqs = feature(Features::HVM_PIRQS),
        XENFEAT_dom0 = feature(Features::DOM0),
        XENFEAT_memory_op_vnode_supported = feature(Features::MEMORY_OP_VNODE_SUPPORTED),
        XENFEAT_ARM_SMCCC_supported = feature(Features::ARM_SMCCC_SUPPORTED),
        XENFEAT_linux_rsdp_unrestricted = feature(Features::LINUX_RSDP_UNRESTRICTED),
        XENFEAT_not_direct_mapped = feature(Features::NOT_DIRECT_MAPPED),
        XENFEAT_direct_mapped = feature(Features::DIRECT_MAPPED), XENFEAT_NR_SUBMAPS = version::XENFEAT_NR_SUBMAPS,
    );
    for (c, ours) in [
        ("sizeof(xen_extraversion_t)", version::EXTRAVERSION_LEN),
        ("sizeof(xen_capabilities_info_t)", version::CAPABILITIES_LEN),
        ("sizeof(xen_changeset_info_t)", version::CHANGESET_LEN),
        ("sizeof(xen_commandline_t)", version::COMMANDLINE_LEN),
        ("sizeof(struct xen_platform_op)", platform::PLATFORM_OP_SIZE),
        ("offsetof(struct xen_domctl, u)", size_of::<xen_header::XenControlHeader>()),
        ("sizeof(struct xen_mc)", platform::MCA_OP_SIZE),
        ("sizeof(struct xen_domctl)", xen_header::DOMCTL_SIZE),
        ("sizeof(struct xen_sysctl)", xen_header::SYSCTL_SIZE),
        ("sizeof(struct xenoprof_init)", xen_header::XENOPROF_INIT_SIZE),
        ("sizeof(struct physdev_op)", physdev::PHYSDEV_OP_SIZE),
        ("sizeof(((struct xen_hvm_xentrace *)0)->extra)", usize::from(hvm::XENTRACE_MAX_EXTRA)),
        ("offsetof(struct xen_platform_op, u)", size_of::<platform::PlatformHeader>()),
    ] {
        facts.push(Fact::new(c, ours as i128));
    }
}

fn cpu(facts: &mut Vec<Fact>) {
    values!(facts:
        RUNSTATE_running = vcpu::RUNSTATE_RUNNING, RUNSTATE_runnable = vcpu::RUNSTATE_RUNNABLE,
        RUNSTATE_blocked = vcpu::RUNSTATE_BLOCKED, RUNSTATE_offline = vcpu::RUNSTATE_OFFLINE,
        XEN_RUNSTATE_UPDATE = vcpu::RUNSTATE_UPDATE, VCPU_SSHOTTMR_future = vcpu::VCPU_SSHOTTMR_FUTURE,
        XEN_PVCLOCK_TSC_STABLE_BIT = PvclockFlags::TSC_STABLE.bits(),
        XEN_PVCLOCK_GUEST_STOPPED = PvclockFlags::GUEST_STOPPED.bits(),
        VGCF_i387_valid = VcpuContextFlags::I387_VALID.bits(), VGCF_in_kernel = VcpuContextFlags::IN_KERNEL.bits(),
        VGCF_failsafe_disables_events = VcpuContextFlags::FAILSAFE_DISABLES_EVENTS.bits(),
        VGCF_syscall_disables_events = VcpuContextFlags::SYSCALL_DISABLES_EVENTS.bits(),
        VGCF_online = VcpuContextFlags::ONLINE.bits(), VGCF_in_syscall = VcpuContextFlags::IN_SYSCALL.bits(),
        FLAT_RING3_CS32 = segment::FLAT_RING3_CS32, FLAT_RING3_CS64 = segment::FLAT_RING3_CS64,
        FLAT_RING3_DS32 = segment::FLAT_RING3_DS32, FLAT_RING3_DS64 = segment::FLAT_RING3_DS64,
        FLAT_RING3_SS32 = segment::FLAT_RING3_SS32, FLAT_RING3_SS64 = segment::FLAT_RING3_SS64,
        FLAT_KERNEL_CS = segment::FLAT_KERNEL_CS, FLAT_KERNEL_DS = segment::FLAT_KERNEL_DS,
        FLAT_KERNEL_SS = segment::FLAT_KERNEL_SS, FLAT_USER_CS = segment::FLAT_USER_CS, FLAT_USER_DS = segment::FLAT_USER_DS,
        FLAT_USER_SS = segment::FLAT_USER_SS,
        HYPERVISOR_VIRT_START = segment::HYPERVISOR_VIRT_START, HYPERVISOR_VIRT_END = segment::HYPERVISOR_VIRT_END,
        MACH2PHYS_VIRT_START = segment::MACH2PHYS_VIRT_START, MACH2PHYS_VIRT_END = segment::MACH2PHYS_VIRT_END,
        CALLBACKF_mask_events = callback::CALLBACKF_MASK_EVENTS,
        XEN_NMIREASON_io_error = NmiReason::IO_ERROR.bits(), XEN_NMIREASON_pci_serr = NmiReason::PCI_SERR.bits(),
        XEN_NMIREASON_unknown = NmiReason::UNKNOWN.bits(),
        XENPF_INTERFACE_VERSION = platform::XENPF_INTERFACE_VERSION,
        XEN_MCA_INTERFACE_VERSION = platform::XEN_MCA_INTERFACE_VERSION,
        XEN_DOMCTL_INTERFACE_VERSION = xen_header::XEN_DOMCTL_INTERFACE_VERSION,
        XEN_SYSCTL_INTERFACE_VERSION = xen_header::XEN_SYSCTL_INTERFACE_VERSION,
        XEN_DOMCTL_createdomain = xen_header::DOMCTL_CREATEDOMAIN,
        XEN_DOMCTL_getdomaininfo = xen_header::DOMCTL_GETDOMAININFO,
        XEN_DOMCTL_shadow_op = xen_header::DOMCTL_SHADOW_OP,
        HVM_NR_PARAMS = hvm::HVM_NR_PARAMS,
        XENMEM_RDM_ALL = memory::XENMEM_RDM_ALL,
        EVTCHN_2L_NR_CHANNELS = shared_info::EVTCHN_2L_NR_CHANNELS,
    );
    for (c, ours) in [
        ("FIRST_RESERVED_GDT_PAGE", segment::FIRST_RESERVED_GDT_PAGE),
        ("FIRST_RESERVED_GDT_BYTE", segment::FIRST_RESERVED_GDT_BYTE),
        ("FIRST_RESERVED_GDT_ENTRY", segment::FIRST_RESERVED_GDT_ENTRY),
        ("XEN_LEGACY_MAX_VCPUS", shared_info::LEGACY_MAX_VCPUS),
        ("(HYPERVISOR_VIRT_START >> 39) & 511", mmu::FIRST_HYPERVISOR_L4_SLOT),
        ("(HYPERVISOR_VIRT_END >> 39) & 511", mmu::END_HYPERVISOR_L4_SLOT),
    ] {
        facts.push(Fact::new(c, ours as i128));
    }
}

fn channels_and_grants(facts: &mut Vec<Fact>) {
    values!(facts:
        BIND_PIRQ__WILL_SHARE = evtchn::BIND_PIRQ_WILL_SHARE,
        EVTCHNSTAT_closed = evtchn::EVTCHNSTAT_CLOSED, EVTCHNSTAT_unbound = evtchn::EVTCHNSTAT_UNBOUND,
        EVTCHNSTAT_interdomain = evtchn::EVTCHNSTAT_INTERDOMAIN, EVTCHNSTAT_pirq = evtchn::EVTCHNSTAT_PIRQ,
        EVTCHNSTAT_virq = evtchn::EVTCHNSTAT_VIRQ, EVTCHNSTAT_ipi = evtchn::EVTCHNSTAT_IPI,
        EVTCHN_FIFO_PRIORITY_MAX = evtchn::EVTCHN_FIFO_PRIORITY_MAX,
        EVTCHN_FIFO_PRIORITY_DEFAULT = evtchn::EVTCHN_FIFO_PRIORITY_DEFAULT,
        EVTCHN_FIFO_PRIORITY_MIN = evtchn::EVTCHN_FIFO_PRIORITY_MIN, EVTCHN_FIFO_PENDING = evtchn::EVTCHN_FIFO_PENDING,
        EVTCHN_FIFO_MASKED = evtchn::EVTCHN_FIFO_MASKED, EVTCHN_FIFO_LINKED = evtchn::EVTCHN_FIFO_LINKED,
        EVTCHN_FIFO_BUSY = evtchn::EVTCHN_FIFO_BUSY, EVTCHN_FIFO_LINK_BITS = evtchn::EVTCHN_FIFO_LINK_BITS,
        EVTCHN_FIFO_LINK_MASK = evtchn::EVTCHN_FIFO_LINK_MASK, EVTCHN_FIFO_NR_CHANNELS = evtchn::EVTCHN_FIFO_NR_CHANNELS,
        GNTTAB_NR_RESERVED_ENTRIES = grant::GNTTAB_NR_RESERVED_ENTRIES,
        GNTTAB_RESERVED_CONSOLE = grant::GNTTAB_RESERVED_CONSOLE.get(),
        GNTTAB_RESERVED_XENSTORE = grant::GNTTAB_RESERVED_XENSTORE.get(),
        GTF_invalid = grant::GTF_INVALID, GTF_permit_access = grant::GTF_PERMIT_ACCESS,
        GTF_accept_transfer = grant::GTF_ACCEPT_TRANSFER, GTF_transitive = grant::GTF_TRANSITIVE,
        GTF_type_mask = grant::GTF_TYPE_MASK, GTF_transfer_committed = grant::GTF_TRANSFER_COMMITTED,
        GTF_transfer_completed = grant::GTF_TRANSFER_COMPLETED,
        GTF_readonly = GrantFlags::READONLY.bits(), GTF_reading = GrantFlags::READING.bits(),
        GTF_writing = GrantFlags::WRITING.bits(), GTF_PWT = GrantFlags::PWT.bits(), GTF_PCD = GrantFlags::PCD.bits(),
        GTF_PAT = GrantFlags::PAT.bits(), GTF_sub_page = GrantFlags::SUB_PAGE.bits(),
        GNTMAP_device_map = MapFlags::DEVICE_MAP.bits(), GNTMAP_host_map = MapFlags::HOST_MAP.bits(),
        GNTMAP_readonly = MapFlags::READONLY.bits(), GNTMAP_application_map = MapFlags::APPLICATION_MAP.bits(),
        GNTMAP_contains_pte = MapFlags::CONTAINS_PTE.bits(), GNTMAP_guest_avail_mask = MapFlags::GUEST_AVAIL.bits(),
        GNTCOPY_source_gref = grant::GNTCOPY_SOURCE_GREF, GNTCOPY_dest_gref = grant::GNTCOPY_DEST_GREF,
        GNTTAB_CACHE_CLEAN = grant::GNTTAB_CACHE_CLEAN, GNTTAB_CACHE_INVAL = grant::GNTTAB_CACHE_INVAL,
        GNTTAB_CACHE_SOURCE_GREF = grant::GNTTAB_CACHE_SOURCE_GREF,
        GNTST_okay = grant::GNTST_OKAY, GNTST_general_error = grant::GNTST_GENERAL_ERROR,
        GNTST_bad_domain = grant::GNTST_BAD_DOMAIN, GNTST_bad_gntref = grant::GNTST_BAD_GNTREF,
        GNTST_bad_handle = grant::GNTST_BAD_HANDLE, GNTST_bad_virt_addr = grant::GNTST_BAD_VIRT_ADDR,
        GNTST_bad_dev_addr = grant::GNTST_BAD_DEV_ADDR, GNTST_no_device_space = grant::GNTST_NO_DEVICE_SPACE,
        GNTST_permission_denied = grant::GNTST_PERMISSION_DENIED, GNTST_bad_page = grant::GNTST_BAD_PAGE,
        GNTST_bad_copy_arg = grant::GNTST_BAD_COPY_ARG, GNTST_address_too_big = grant::GNTST_ADDRESS_TOO_BIG,
        GNTST_eagain = grant::GNTST_EAGAIN, GNTST_no_space = grant::GNTST_NO_SPACE,
    );
    facts.push(Fact::new("EVTCHN_FIFO_MAX_QUEUES", evtchn::EVTCHN_FIFO_MAX_QUEUES as i128));
}

fn devices(facts: &mut Vec<Fact>) {
    values!(facts:
        XENIRQSTAT_needs_eoi = physdev::XENIRQSTAT_NEEDS_EOI, XENIRQSTAT_shared = physdev::XENIRQSTAT_SHARED,
        MAP_PIRQ_TYPE_MSI = physdev::MAP_PIRQ_TYPE_MSI, MAP_PIRQ_TYPE_GSI = physdev::MAP_PIRQ_TYPE_GSI,
        MAP_PIRQ_TYPE_UNKNOWN = physdev::MAP_PIRQ_TYPE_UNKNOWN, MAP_PIRQ_TYPE_MSI_SEG = physdev::MAP_PIRQ_TYPE_MSI_SEG,
        MAP_PIRQ_TYPE_MULTI_MSI = physdev::MAP_PIRQ_TYPE_MULTI_MSI, XEN_PCI_MMCFG_RESERVED = physdev::XEN_PCI_MMCFG_RESERVED,
        XEN_PCI_DEV_EXTFN = physdev::XEN_PCI_DEV_EXTFN, XEN_PCI_DEV_VIRTFN = physdev::XEN_PCI_DEV_VIRTFN,
        XEN_PCI_DEV_PXM = physdev::XEN_PCI_DEV_PXM,
        XENSTORE_SERVER_FEATURE_RECONNECTION = xenstore::SERVER_FEATURE_RECONNECTION,
        XENSTORE_SERVER_FEATURE_ERROR = xenstore::SERVER_FEATURE_ERROR, XENSTORE_CONNECTED = xenstore::CONNECTED,
        XENSTORE_RECONNECT = xenstore::RECONNECT, XENSTORE_ERROR_NONE = xenstore::ERROR_NONE,
        XENSTORE_ERROR_COMM = xenstore::ERROR_COMM, XENSTORE_ERROR_RINGIDX = xenstore::ERROR_RINGIDX,
        XENSTORE_ERROR_PROTO = xenstore::ERROR_PROTO,
        BLKIF_DISCARD_SECURE = blkif::DISCARD_SECURE, BLKIF_RSP_OKAY = blkif::RSP_OKAY, BLKIF_RSP_ERROR = blkif::RSP_ERROR,
        BLKIF_RSP_EOPNOTSUPP = blkif::RSP_EOPNOTSUPP, VDISK_CDROM = blkif::VDISK_CDROM,
        VDISK_REMOVABLE = blkif::VDISK_REMOVABLE, VDISK_READONLY = blkif::VDISK_READONLY,
        NETTXF_csum_blank = TxFlags::CSUM_BLANK.bits(), NETTXF_data_validated = TxFlags::DATA_VALIDATED.bits(),
        NETTXF_more_data = TxFlags::MORE_DATA.bits(), NETTXF_extra_info = TxFlags::EXTRA_INFO.bits(),
        NETRXF_data_validated = RxFlags::DATA_VALIDATED.bits(), NETRXF_csum_blank = RxFlags::CSUM_BLANK.bits(),
        NETRXF_more_data = RxFlags::MORE_DATA.bits(), NETRXF_extra_info = RxFlags::EXTRA_INFO.bits(),
        NETRXF_gso_prefix = RxFlags::GSO_PREFIX.bits(),
        XEN_NETIF_EXTRA_TYPE_GSO = netif::EXTRA_TYPE_GSO, XEN_NETIF_EXTRA_TYPE_MCAST_ADD = netif::EXTRA_TYPE_MCAST_ADD,
        XEN_NETIF_EXTRA_TYPE_MCAST_DEL = netif::EXTRA_TYPE_MCAST_DEL, XEN_NETIF_EXTRA_TYPE_HASH = netif::EXTRA_TYPE_HASH,
        XEN_NETIF_EXTRA_FLAG_MORE = netif::EXTRA_FLAG_MORE, XEN_NETIF_GSO_TYPE_TCPV4 = netif::GSO_TYPE_TCPV4,
        XEN_NETIF_GSO_TYPE_TCPV6 = netif::GSO_TYPE_TCPV6,
        NETIF_RSP_DROPPED = netif::RSP_DROPPED, NETIF_RSP_ERROR = netif::RSP_ERROR, NETIF_RSP_OKAY = netif::RSP_OKAY,
        NETIF_RSP_NULL = netif::RSP_NULL,
        XEN_NETIF_CTRL_HASH_TYPE_IPV4 = HashTypes::IPV4.bits(), XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP = HashTypes::IPV4_TCP.bits(),
        XEN_NETIF_CTRL_HASH_TYPE_IPV6 = HashTypes::IPV6.bits(), XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP = HashTypes::IPV6_TCP.bits(),
        XEN_NETIF_CTRL_HASH_ALGORITHM_NONE = netif::HASH_ALGORITHM_NONE,
        XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ = netif::HASH_ALGORITHM_TOEPLITZ,
        XEN_NETIF_CTRLF_GREF_readonly = netif::CTRL_GREF_READONLY,
        XEN_NETIF_CTRL_STATUS_SUCCESS = netif::CTRL_STATUS_SUCCESS,
        XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED = netif::CTRL_STATUS_NOT_SUPPORTED,
        XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER = netif::CTRL_STATUS_INVALID_PARAMETER,
        XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW = netif::CTRL_STATUS_BUFFER_OVERFLOW,
        XS_INVALID = xenstore::INVALID, XS_WATCH_PATH = xenstore::WATCH_PATH, XS_WATCH_TOKEN = xenstore::WATCH_TOKEN,
    );
    for (index, error) in xenstore::ERRORS.iter().enumerate() {
        facts.push(Fact::new(format!("xsd_errors[{index}].errnum"), error.number()));
    }
    let gso = |extra| netif::NetifExtraInfo::new(extra, false);
    let byte = |info: netif::NetifExtraInfo, wanted: u8| {
        info.as_bytes().iter().position(|byte| *byte == wanted).map_or(-1, |at| at as i128)
    };
    // Where the parts of the union lie, found by what the constructor writes there.
    let segments = gso(netif::Extra::Gso { size: 0x7071, kind: 0x72 });
    let hash = gso(netif::Extra::Hash { kind: 0x73, algorithm: 0x74, value: [0x75, 0, 0, 0] });
    for (c, ours) in [
        ("u.gso.size", byte(segments, 0x71)),
        ("u.gso.type", byte(segments, 0x72)),
        ("u.mcast.addr", byte(gso(netif::Extra::McastAdd([0x76, 0, 0, 0, 0, 0])), 0x76)),
        ("u.hash.type", byte(hash, 0x73)),
        ("u.hash.algorithm", byte(hash, 0x74)),
        ("u.hash.value", byte(hash, 0x75)),
    ] {
        facts.push(Fact::new(format!("offsetof(struct netif_extra_info, {c})"), ours));
    }
    let console = offset_of!(start_info::StartInfo, console);
    for (c, ours) in [
        ("XENSTORE_RING_SIZE", xenstore::RING_SIZE),
        ("XENSTORE_PAYLOAD_MAX", xenstore::PAYLOAD_MAX),
        ("XENSTORE_ABS_PATH_MAX", xenstore::ABS_PATH_MAX),
        ("XENSTORE_REL_PATH_MAX", xenstore::REL_PATH_MAX),
        ("BLKIF_MAX_SEGMENTS_PER_REQUEST", blkif::MAX_SEGMENTS_PER_REQUEST),
        ("BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST", blkif::MAX_INDIRECT_PAGES_PER_REQUEST),
        ("sizeof(union blkif_sring_entry)", blkif::SLOT_SIZE),
        ("sizeof(union netif_tx_sring_entry)", netif::TX_SLOT_SIZE),
        ("sizeof(union netif_rx_sring_entry)", netif::RX_SLOT_SIZE),
        ("XEN_NETIF_MAX_TX_SIZE", netif::MAX_TX_SIZE),
        ("XEN_NETIF_NR_SLOTS_MIN", netif::NR_SLOTS_MIN),
        ("sizeof(union xen_netif_ctrl_sring_entry)", netif::CONTROL_SLOT_SIZE),
        ("4096 / sizeof(struct blkif_request_segment)", blkif::SEGMENTS_PER_INDIRECT_PAGE),
        ("offsetof(struct blkif_sring, ring)", ring::SLOTS_OFFSET),
        ("offsetof(struct blkif_sring, req_prod)", ring::RingHeader::REQ_PROD),
        ("offsetof(struct blkif_sring, req_event)", ring::RingHeader::REQ_EVENT),
        ("offsetof(struct blkif_sring, rsp_prod)", ring::RingHeader::RSP_PROD),
        ("offsetof(struct blkif_sring, rsp_event)", ring::RingHeader::RSP_EVENT),
        ("sizeof(xsd_errors) / sizeof(xsd_errors[0])", xenstore::ERRORS.len()),
        ("sizeof(((struct start_info *)0)->console)", size_of::<start_info::ConsoleStart>()),
        ("sizeof(((struct start_info *)0)->console)", size_of::<start_info::Dom0ConsoleStart>()),
        (
            "offsetof(struct start_info, console.domU.mfn)",
            console + offset_of!(start_info::ConsoleStart, mfn),
        ),
        (
            "offsetof(struct start_info, console.domU.evtchn)",
            console + offset_of!(start_info::ConsoleStart, evtchn),
        ),
        (
            "offsetof(struct start_info, console.dom0.info_off)",
            console + offset_of!(start_info::Dom0ConsoleStart, info_off),
        ),
        (
            "offsetof(struct start_info, console.dom0.info_size)",
            console + offset_of!(start_info::Dom0ConsoleStart, info_size),
        ),
    ] {
        facts.push(Fact::new(c, ours as i128));
    }
}

fn control(facts: &mut Vec<Fact>) {
    use xen_control::DomainFlags;
    values!(facts:
        XEN_DOMCTL_INTERFACE_VERSION = xen_control::INTERFACE_VERSION,
        XEN_SYSCTL_INTERFACE_VERSION = xen_control::INTERFACE_VERSION,
        XEN_DOMINF_dying = DomainFlags::DYING.bits(), XEN_DOMINF_hvm_guest = DomainFlags::HVM_GUEST.bits(),
        XEN_DOMINF_shutdown = DomainFlags::SHUTDOWN.bits(), XEN_DOMINF_paused = DomainFlags::PAUSED.bits(),
        XEN_DOMINF_blocked = DomainFlags::BLOCKED.bits(), XEN_DOMINF_running = DomainFlags::RUNNING.bits(),
        XEN_DOMINF_debugged = DomainFlags::DEBUGGED.bits(), XEN_DOMINF_xs_domain = DomainFlags::XS_DOMAIN.bits(),
        XEN_DOMINF_hap = DomainFlags::HAP.bits(), XEN_DOMINF_shutdownshift = xen_control::SHUTDOWN_SHIFT,
        XEN_DOMINF_shutdownmask = xen_control::SHUTDOWN_MASK,
        XEN_INVALID_MAX_VCPU_ID = xen_control::INVALID_MAX_VCPU_ID,
        XEN_SCHEDULER_CREDIT = xen_control::SCHEDULER_CREDIT, XEN_SCHEDULER_CREDIT2 = xen_control::SCHEDULER_CREDIT2,
        XEN_DOMCTL_SCHEDOP_putinfo = xen_control::SCHEDOP_PUTINFO, XEN_DOMCTL_SCHEDOP_getinfo = xen_control::SCHEDOP_GETINFO,
    );
    facts.push(Fact::new("XEN_DOMCTL_GRANT_version(2)", xen_control::GRANT_VERSION_2));
}
