"""QEMU's command line for a sandbox, from a description of the machine. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from kata_shim.qemu.devices import ConnectedSocket, Device, ListeningSocket, Value, escape, keyval
from kata_shim.qemu.topology import FIXED_SLOTS, Topology

AGENT_PORT = "agent.channel.0"
SHARED_TAG = "kataShared"  # the Kata runtime's
# Requests that wait, and so how much one may carry: 256 pages of 4 KiB, which is the most a guest asks for.
SHARED_QUEUE_SIZE = 1024
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

# Emulated RDRAND asks the host each time and la57 lengthens every page walk: a sixth of the boot together.
# The guest has virtio-rng for its entropy. ERMS and FSRM tell a kernel that `rep movsb` is quick: emulated,
# byte by byte, it takes four times as long as how memory is copied otherwise.
TCG_CPU_MODEL = "max,-rdrand,-rdseed,-la57,-erms,-fsrm"


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineSpec:
    """Everything that decides how QEMU is started; what configuration.toml sets has its name there.

    `default_memory` and `max_memory` are in MiB; a maximum of 0 is what there is from the start. The three
    `*_fd` are listening unix sockets that QEMU inherits by number; `agent_fd` -1 leaves the virtio-serial
    channel out (vsock instead: `guest_cid` above 2). `memory_path` is a file of that size that holds the
    guest's memory; without one it is a memfd if `shared_memory`, else QEMU's own. `shared_directory` is
    the guest's 9p file system SHARED_TAG, which with `virtio_fs` is served at the other end of the connected
    `files_fd` instead. A machine that is `incoming` waits for its saved state and does
    not boot.
    """

    name: str
    uuid: str
    path: str
    topology: Topology
    accelerator: str
    kernel: str
    initrd: str
    default_vcpus: int
    default_memory: int
    qmp_fd: int
    console_fd: int
    agent_fd: int = -1
    guest_cid: int = 0
    kernel_params: str = ""
    machine_accelerators: str = ""
    cpu_model: str = ""
    firmware: str = ""
    entropy_source: str = "/dev/urandom"
    shared_memory: bool = True
    memory_path: str = ""
    shared_directory: str = ""
    virtio_fs: bool = False
    files_fd: int = -1
    incoming: bool = False
    enable_debug: bool = False
    max_vcpus: int = 0
    max_memory: int = 0
    memory_slots: int = 0

    @property
    def huge_pages(self) -> bool:
        """Whether QEMU is let have transparent huge pages.

        The memory of a clone, mapped from a file, has none anyhow. TCG asks for them for the code that it
        makes, which is no faster for them, and holds 3 to 5 MiB more.
        """
        return not (self.incoming and self.accelerator == "tcg")


def build(spec: MachineSpec) -> list[str]:
    """Return the argv, `path` first."""
    argv = [spec.path, "-name", keyval(spec.name, {"debug-threads": True}), "-uuid", spec.uuid]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-sandbox", SANDBOX]
    # With `panic=-1` a guest that panics resets at once, and QEMU ends: the shim sees it without any timer.
    argv += ["-no-reboot"]
    argv += _machine(spec)
    argv += ["-kernel", spec.kernel]
    if spec.initrd:
        argv += ["-initrd", spec.initrd]
    argv += ["-append", kernel_command_line(spec.kernel_params, spec.enable_debug)]
    if spec.firmware:
        argv += ["-bios", spec.firmware]
    argv += _channels(spec)
    argv += _devices(spec)
    for controller in spec.topology.controllers:
        argv += controller.argv
    if spec.incoming:
        argv += ["-incoming", "defer"]
    return argv


def kernel_command_line(kernel_params: str, enable_debug: bool) -> str:
    """Return the guest kernel's parameters; the user's come last, so that they win."""
    words = ["console=ttyS0", "panic=-1", "tsc=reliable", "no_timer_check", "mitigations=off"]
    # ACPI plugs the devices. The root ports' own services would only make the guest's end longer, by half a
    # second each.
    words += ["pcie_ports=compat"]
    # Who asks gets huge pages. Unasked, each small heap of the agent takes 2 MiB at the first touch: zeroed
    # by the guest, so every clone's own, 4 to 8 MiB in all.
    words += ["transparent_hugepage=madvise"]
    words += ["loglevel=7"] if enable_debug else ["quiet", "loglevel=3"]
    return " ".join([*words, *kernel_params.split()])


def default_cpu_model(accelerator: str) -> str:
    """Return the CPU model for an accelerator: all of the host's under KVM, else what TCG does well."""
    return "host" if accelerator == "kvm" else TCG_CPU_MODEL


def _machine(spec: MachineSpec) -> list[str]:
    memory = _memory(spec)
    properties: dict[str, Value] = {"memory-backend": "mem"} if memory else {}
    extra = ",".join(word.strip() for word in spec.machine_accelerators.split(",") if word.strip())
    machine = keyval(spec.topology.machine_type, properties) + (f",{extra}" if extra else "")
    argv = ["-machine", machine, "-accel", _accelerator(spec)]
    argv += ["-cpu", spec.cpu_model or default_cpu_model(spec.accelerator)]
    return [*argv, "-smp", _vcpus(spec), "-m", _memory_size(spec), *memory]


def _accelerator(spec: MachineSpec) -> str:
    # With a thread for each CPU one can go on with what TCG has translated of code that another one has
    # changed since: a guest's kernel that patches itself (a static key) may hang then (QEMU 7.2).
    shared = spec.accelerator == "tcg" and max(spec.default_vcpus, spec.max_vcpus) > 1
    return "tcg,thread=single" if shared else spec.accelerator


def _vcpus(spec: MachineSpec) -> str:
    more = f",maxcpus={spec.max_vcpus}" if spec.max_vcpus > spec.default_vcpus else ""
    return f"{spec.default_vcpus}{more}"


def _memory_size(spec: MachineSpec) -> str:
    can_grow = spec.memory_slots and spec.max_memory > spec.default_memory
    more = f",slots={spec.memory_slots},maxmem={spec.max_memory}M" if can_grow else ""
    return f"{spec.default_memory}M{more}"


def _memory(spec: MachineSpec) -> list[str]:
    """The guest's memory where it is not simply QEMU's own.

    QEMU's saved state names it by its id, so a file, whether shared or not, and a memfd are alike to it.
    """
    if not spec.shared_memory and not spec.memory_path:
        return []
    backend: dict[str, Value] = {"id": "mem", "size": f"{spec.default_memory}M", "share": spec.shared_memory}
    if spec.memory_path:
        return ["-object", keyval("memory-backend-file", {**backend, "mem-path": spec.memory_path})]
    return ["-object", keyval("memory-backend-memfd", backend)]


def _channels(spec: MachineSpec) -> list[str]:
    argv = [*ListeningSocket("qmp", spec.qmp_fd).argv, "-mon", "chardev=qmp,mode=control"]
    argv += [*ListeningSocket("console", spec.console_fd).argv, "-serial", "chardev:console"]
    if spec.agent_fd >= 0:
        argv += ListeningSocket("agent", spec.agent_fd).argv
        argv += Device("virtio-serial-pci", "serial", {"addr": FIXED_SLOTS["serial"]}).argv
        port: dict[str, Value] = {"bus": "serial.0", "chardev": "agent", "name": AGENT_PORT}
        argv += Device("virtserialport", "agent-port", port).argv
    if spec.guest_cid:
        vsock: dict[str, Value] = {"addr": FIXED_SLOTS["vsock"], "guest-cid": spec.guest_cid}
        argv += Device("vhost-vsock-pci", "vsock", vsock).argv
    return argv


def _devices(spec: MachineSpec) -> list[str]:
    argv = ["-object", f"rng-random,id=entropy,filename={escape(spec.entropy_source)}"]
    argv += Device("virtio-rng-pci", "rng", {"addr": FIXED_SLOTS["rng"], "rng": "entropy"}).argv
    argv += _virtio_fs(spec) if spec.virtio_fs else _virtio_9p(spec)
    return [*argv, *Device("vmgenid", "generation", {"guid": "auto"}).argv]


def _virtio_9p(spec: MachineSpec) -> list[str]:
    files: dict[str, Value] = {"id": "shared", "path": spec.shared_directory, "security_model": "passthrough"}
    # Several file systems meet in there; two files must not seem the same one.
    argv = ["-fsdev", keyval("local", {**files, "multidevs": "remap"})]
    share: dict[str, Value] = {"addr": FIXED_SLOTS["shared"], "fsdev": "shared", "mount_tag": SHARED_TAG}
    return [*argv, *Device("virtio-9p-pci", "shared-files", share).argv]


def _virtio_fs(spec: MachineSpec) -> list[str]:
    share: dict[str, Value] = {"addr": FIXED_SLOTS["shared"], "chardev": "shared", "tag": SHARED_TAG}
    share["queue-size"] = SHARED_QUEUE_SIZE
    if spec.accelerator == "tcg":
        share["vectors"] = 0  # QEMU before 10 crashes when TCG meets vhost-user and MSI-X
    argv = ConnectedSocket("shared", spec.files_fd).argv
    return [*argv, *Device("vhost-user-fs-pci", "shared-files", share).argv]
