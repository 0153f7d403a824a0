from google.protobuf import empty_pb2 as _empty_pb2
from kata_shim.protos import agent_pb2 as _agent_pb2
from kata_shim.protos import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Stream(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NONE: _ClassVar[Stream]
    STDOUT: _ClassVar[Stream]
    STDERR: _ClassVar[Stream]
NONE: Stream
STDOUT: Stream
STDERR: Stream

class ClaimRequest(_message.Message):
    __slots__ = ("seed", "name", "machine_id")
    SEED_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MACHINE_ID_FIELD_NUMBER: _ClassVar[int]
    seed: bytes
    name: str
    machine_id: str
    def __init__(self, seed: _Optional[bytes] = ..., name: _Optional[str] = ..., machine_id: _Optional[str] = ...) -> None: ...

class StandStillRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AddRouteRequest(_message.Message):
    __slots__ = ("route",)
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    route: _types_pb2.Route
    def __init__(self, route: _Optional[_Union[_types_pb2.Route, _Mapping]] = ...) -> None: ...

class DeleteRoutesRequest(_message.Message):
    __slots__ = ("dest", "gateway", "device")
    DEST_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    dest: str
    gateway: str
    device: str
    def __init__(self, dest: _Optional[str] = ..., gateway: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class ListMainRoutesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StartCommandRequest(_message.Message):
    __slots__ = ("argv", "env", "cwd", "stdin")
    ARGV_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    CWD_FIELD_NUMBER: _ClassVar[int]
    STDIN_FIELD_NUMBER: _ClassVar[int]
    argv: _containers.RepeatedScalarFieldContainer[str]
    env: _containers.RepeatedScalarFieldContainer[str]
    cwd: str
    stdin: bool
    def __init__(self, argv: _Optional[_Iterable[str]] = ..., env: _Optional[_Iterable[str]] = ..., cwd: _Optional[str] = ..., stdin: _Optional[bool] = ...) -> None: ...

class StartCommandResponse(_message.Message):
    __slots__ = ("command_id",)
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    def __init__(self, command_id: _Optional[int] = ...) -> None: ...

class WriteStdinRequest(_message.Message):
    __slots__ = ("command_id", "data")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    data: bytes
    def __init__(self, command_id: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class CloseStdinRequest(_message.Message):
    __slots__ = ("command_id",)
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    def __init__(self, command_id: _Optional[int] = ...) -> None: ...

class ReadOutputRequest(_message.Message):
    __slots__ = ("command_id", "stream", "len")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    LEN_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    stream: Stream
    len: int
    def __init__(self, command_id: _Optional[int] = ..., stream: _Optional[_Union[Stream, str]] = ..., len: _Optional[int] = ...) -> None: ...

class ReadOutputResponse(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class WaitCommandRequest(_message.Message):
    __slots__ = ("command_id",)
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    def __init__(self, command_id: _Optional[int] = ...) -> None: ...

class WaitCommandResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: int
    def __init__(self, status: _Optional[int] = ...) -> None: ...

class KillCommandRequest(_message.Message):
    __slots__ = ("command_id", "signal")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    signal: int
    def __init__(self, command_id: _Optional[int] = ..., signal: _Optional[int] = ...) -> None: ...

class RelayNetlinkRequest(_message.Message):
    __slots__ = ("protocol", "messages", "relay_id", "deflated")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    RELAY_ID_FIELD_NUMBER: _ClassVar[int]
    DEFLATED_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    messages: _containers.RepeatedScalarFieldContainer[bytes]
    relay_id: int
    deflated: bytes
    def __init__(self, protocol: _Optional[int] = ..., messages: _Optional[_Iterable[bytes]] = ..., relay_id: _Optional[int] = ..., deflated: _Optional[bytes] = ...) -> None: ...

class ReadTableRequest(_message.Message):
    __slots__ = ("name", "relay_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RELAY_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    relay_id: int
    def __init__(self, name: _Optional[str] = ..., relay_id: _Optional[int] = ...) -> None: ...

class RelayResponse(_message.Message):
    __slots__ = ("data", "relay_id")
    DATA_FIELD_NUMBER: _ClassVar[int]
    RELAY_ID_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    relay_id: int
    def __init__(self, data: _Optional[bytes] = ..., relay_id: _Optional[int] = ...) -> None: ...

class CountTableRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class CountTableResponse(_message.Message):
    __slots__ = ("lines",)
    LINES_FIELD_NUMBER: _ClassVar[int]
    lines: int
    def __init__(self, lines: _Optional[int] = ...) -> None: ...
