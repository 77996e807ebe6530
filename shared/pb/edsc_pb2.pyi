from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SymbolFrame(_message.Message):
    __slots__ = ("samples", "messages", "uses", "snr_db")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    SNR_DB_FIELD_NUMBER: _ClassVar[int]
    samples: bytes
    messages: int
    uses: int
    snr_db: float
    def __init__(self, samples: _Optional[bytes] = ..., messages: _Optional[int] = ..., uses: _Optional[int] = ..., snr_db: _Optional[float] = ...) -> None: ...

class ReceivedFrame(_message.Message):
    __slots__ = ("samples", "messages", "uses", "csi", "csi_uses", "pilots", "pilot_uses", "noise_variance")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    CSI_FIELD_NUMBER: _ClassVar[int]
    CSI_USES_FIELD_NUMBER: _ClassVar[int]
    PILOTS_FIELD_NUMBER: _ClassVar[int]
    PILOT_USES_FIELD_NUMBER: _ClassVar[int]
    NOISE_VARIANCE_FIELD_NUMBER: _ClassVar[int]
    samples: bytes
    messages: int
    uses: int
    csi: bytes
    csi_uses: int
    pilots: bytes
    pilot_uses: int
    noise_variance: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, samples: _Optional[bytes] = ..., messages: _Optional[int] = ..., uses: _Optional[int] = ..., csi: _Optional[bytes] = ..., csi_uses: _Optional[int] = ..., pilots: _Optional[bytes] = ..., pilot_uses: _Optional[int] = ..., noise_variance: _Optional[_Iterable[float]] = ...) -> None: ...

class BandwidthRatio(_message.Message):
    __slots__ = ("paper", "complex_uses", "uses", "pilot_uses")
    PAPER_FIELD_NUMBER: _ClassVar[int]
    COMPLEX_USES_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    PILOT_USES_FIELD_NUMBER: _ClassVar[int]
    paper: float
    complex_uses: float
    uses: int
    pilot_uses: int
    def __init__(self, paper: _Optional[float] = ..., complex_uses: _Optional[float] = ..., uses: _Optional[int] = ..., pilot_uses: _Optional[int] = ...) -> None: ...

class TransmitRequest(_message.Message):
    __slots__ = ("image", "instruction", "snr_db", "quality", "align", "omit_pictures", "scheme")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    SNR_DB_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    ALIGN_FIELD_NUMBER: _ClassVar[int]
    OMIT_PICTURES_FIELD_NUMBER: _ClassVar[int]
    SCHEME_FIELD_NUMBER: _ClassVar[int]
    image: bytes
    instruction: str
    snr_db: float
    quality: str
    align: bool
    omit_pictures: bool
    scheme: str
    def __init__(self, image: _Optional[bytes] = ..., instruction: _Optional[str] = ..., snr_db: _Optional[float] = ..., quality: _Optional[str] = ..., align: _Optional[bool] = ..., omit_pictures: _Optional[bool] = ..., scheme: _Optional[str] = ...) -> None: ...

class Edit(_message.Message):
    __slots__ = ("attribute", "change", "target", "direction", "description", "confidence")
    ATTRIBUTE_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    attribute: str
    change: int
    target: int
    direction: str
    description: str
    confidence: float
    def __init__(self, attribute: _Optional[str] = ..., change: _Optional[int] = ..., target: _Optional[int] = ..., direction: _Optional[str] = ..., description: _Optional[str] = ..., confidence: _Optional[float] = ...) -> None: ...

class AttributeDegrees(_message.Message):
    __slots__ = ("attribute", "before", "expected", "after")
    ATTRIBUTE_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    attribute: str
    before: int
    expected: int
    after: int
    def __init__(self, attribute: _Optional[str] = ..., before: _Optional[int] = ..., expected: _Optional[int] = ..., after: _Optional[int] = ...) -> None: ...

class TransmitReply(_message.Message):
    __slots__ = ("frame", "edit", "degrees", "reached", "match_steps", "faces_found", "aligned_png", "sent_png", "timings_ms", "header_uses", "stream_bits")
    class TimingsMsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    FRAME_FIELD_NUMBER: _ClassVar[int]
    EDIT_FIELD_NUMBER: _ClassVar[int]
    DEGREES_FIELD_NUMBER: _ClassVar[int]
    REACHED_FIELD_NUMBER: _ClassVar[int]
    MATCH_STEPS_FIELD_NUMBER: _ClassVar[int]
    FACES_FOUND_FIELD_NUMBER: _ClassVar[int]
    ALIGNED_PNG_FIELD_NUMBER: _ClassVar[int]
    SENT_PNG_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_MS_FIELD_NUMBER: _ClassVar[int]
    HEADER_USES_FIELD_NUMBER: _ClassVar[int]
    STREAM_BITS_FIELD_NUMBER: _ClassVar[int]
    frame: SymbolFrame
    edit: Edit
    degrees: _containers.RepeatedCompositeFieldContainer[AttributeDegrees]
    reached: bool
    match_steps: int
    faces_found: int
    aligned_png: bytes
    sent_png: bytes
    timings_ms: _containers.ScalarMap[str, float]
    header_uses: int
    stream_bits: int
    def __init__(self, frame: _Optional[_Union[SymbolFrame, _Mapping]] = ..., edit: _Optional[_Union[Edit, _Mapping]] = ..., degrees: _Optional[_Iterable[_Union[AttributeDegrees, _Mapping]]] = ..., reached: _Optional[bool] = ..., match_steps: _Optional[int] = ..., faces_found: _Optional[int] = ..., aligned_png: _Optional[bytes] = ..., sent_png: _Optional[bytes] = ..., timings_ms: _Optional[_Mapping[str, float]] = ..., header_uses: _Optional[int] = ..., stream_bits: _Optional[int] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("stage", "fraction", "elapsed_ms")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_MS_FIELD_NUMBER: _ClassVar[int]
    stage: str
    fraction: float
    elapsed_ms: float
    def __init__(self, stage: _Optional[str] = ..., fraction: _Optional[float] = ..., elapsed_ms: _Optional[float] = ...) -> None: ...

class TransmitEvent(_message.Message):
    __slots__ = ("progress", "reply")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    progress: Progress
    reply: TransmitReply
    def __init__(self, progress: _Optional[_Union[Progress, _Mapping]] = ..., reply: _Optional[_Union[TransmitReply, _Mapping]] = ...) -> None: ...

class ReadInstructionRequest(_message.Message):
    __slots__ = ("instruction",)
    INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    instruction: str
    def __init__(self, instruction: _Optional[str] = ...) -> None: ...

class ReadInstructionReply(_message.Message):
    __slots__ = ("edit",)
    EDIT_FIELD_NUMBER: _ClassVar[int]
    edit: Edit
    def __init__(self, edit: _Optional[_Union[Edit, _Mapping]] = ...) -> None: ...

class DescribeModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelDescription(_message.Message):
    __slots__ = ("name", "digest", "uses", "image_size", "attributes", "max_degree", "qualities", "networks", "threads", "schemes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    IMAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    MAX_DEGREE_FIELD_NUMBER: _ClassVar[int]
    QUALITIES_FIELD_NUMBER: _ClassVar[int]
    NETWORKS_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    SCHEMES_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    uses: int
    image_size: int
    attributes: _containers.RepeatedScalarFieldContainer[str]
    max_degree: int
    qualities: _containers.RepeatedScalarFieldContainer[str]
    networks: _containers.RepeatedScalarFieldContainer[str]
    threads: int
    schemes: _containers.RepeatedCompositeFieldContainer[SchemeDescription]
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., uses: _Optional[int] = ..., image_size: _Optional[int] = ..., attributes: _Optional[_Iterable[str]] = ..., max_degree: _Optional[int] = ..., qualities: _Optional[_Iterable[str]] = ..., networks: _Optional[_Iterable[str]] = ..., threads: _Optional[int] = ..., schemes: _Optional[_Iterable[_Union[SchemeDescription, _Mapping]]] = ...) -> None: ...

class SchemeDescription(_message.Message):
    __slots__ = ("name", "description", "cbr", "header_uses", "printed_cbr", "missing")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    CBR_FIELD_NUMBER: _ClassVar[int]
    HEADER_USES_FIELD_NUMBER: _ClassVar[int]
    PRINTED_CBR_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    cbr: BandwidthRatio
    header_uses: int
    printed_cbr: float
    missing: str
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ..., cbr: _Optional[_Union[BandwidthRatio, _Mapping]] = ..., header_uses: _Optional[int] = ..., printed_cbr: _Optional[float] = ..., missing: _Optional[str] = ...) -> None: ...

class PropagateRequest(_message.Message):
    __slots__ = ("frame", "channel", "fading", "k_factor_db", "csi", "pilots", "snr_db", "seed", "image_size")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    FADING_FIELD_NUMBER: _ClassVar[int]
    K_FACTOR_DB_FIELD_NUMBER: _ClassVar[int]
    CSI_FIELD_NUMBER: _ClassVar[int]
    PILOTS_FIELD_NUMBER: _ClassVar[int]
    SNR_DB_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    IMAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    frame: SymbolFrame
    channel: str
    fading: str
    k_factor_db: float
    csi: str
    pilots: int
    snr_db: float
    seed: int
    image_size: int
    def __init__(self, frame: _Optional[_Union[SymbolFrame, _Mapping]] = ..., channel: _Optional[str] = ..., fading: _Optional[str] = ..., k_factor_db: _Optional[float] = ..., csi: _Optional[str] = ..., pilots: _Optional[int] = ..., snr_db: _Optional[float] = ..., seed: _Optional[int] = ..., image_size: _Optional[int] = ...) -> None: ...

class PropagateReply(_message.Message):
    __slots__ = ("frame", "cbr", "seed", "fading_db", "timings_ms")
    class TimingsMsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    FRAME_FIELD_NUMBER: _ClassVar[int]
    CBR_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    FADING_DB_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_MS_FIELD_NUMBER: _ClassVar[int]
    frame: ReceivedFrame
    cbr: BandwidthRatio
    seed: int
    fading_db: _containers.RepeatedScalarFieldContainer[float]
    timings_ms: _containers.ScalarMap[str, float]
    def __init__(self, frame: _Optional[_Union[ReceivedFrame, _Mapping]] = ..., cbr: _Optional[_Union[BandwidthRatio, _Mapping]] = ..., seed: _Optional[int] = ..., fading_db: _Optional[_Iterable[float]] = ..., timings_ms: _Optional[_Mapping[str, float]] = ...) -> None: ...

class DescribeChannelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ChannelKind(_message.Message):
    __slots__ = ("name", "description", "fadings", "has_k_factor")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    FADINGS_FIELD_NUMBER: _ClassVar[int]
    HAS_K_FACTOR_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    fadings: _containers.RepeatedScalarFieldContainer[str]
    has_k_factor: bool
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ..., fadings: _Optional[_Iterable[str]] = ..., has_k_factor: _Optional[bool] = ...) -> None: ...

class ChannelDescription(_message.Message):
    __slots__ = ("channels", "csi", "min_snr_db", "max_snr_db", "default_k_factor_db", "default_pilots", "max_samples")
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    CSI_FIELD_NUMBER: _ClassVar[int]
    MIN_SNR_DB_FIELD_NUMBER: _ClassVar[int]
    MAX_SNR_DB_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_K_FACTOR_DB_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_PILOTS_FIELD_NUMBER: _ClassVar[int]
    MAX_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    channels: _containers.RepeatedCompositeFieldContainer[ChannelKind]
    csi: _containers.RepeatedScalarFieldContainer[str]
    min_snr_db: float
    max_snr_db: float
    default_k_factor_db: float
    default_pilots: int
    max_samples: int
    def __init__(self, channels: _Optional[_Iterable[_Union[ChannelKind, _Mapping]]] = ..., csi: _Optional[_Iterable[str]] = ..., min_snr_db: _Optional[float] = ..., max_snr_db: _Optional[float] = ..., default_k_factor_db: _Optional[float] = ..., default_pilots: _Optional[int] = ..., max_samples: _Optional[int] = ...) -> None: ...

class ReceiveRequest(_message.Message):
    __slots__ = ("frame", "scheme")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    SCHEME_FIELD_NUMBER: _ClassVar[int]
    frame: ReceivedFrame
    scheme: str
    def __init__(self, frame: _Optional[_Union[ReceivedFrame, _Mapping]] = ..., scheme: _Optional[str] = ...) -> None: ...

class ReceiveReply(_message.Message):
    __slots__ = ("png", "image_size", "timings_ms", "degrees", "reached", "match_steps", "edit", "blocks", "block_errors", "digest")
    class TimingsMsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    PNG_FIELD_NUMBER: _ClassVar[int]
    IMAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_MS_FIELD_NUMBER: _ClassVar[int]
    DEGREES_FIELD_NUMBER: _ClassVar[int]
    REACHED_FIELD_NUMBER: _ClassVar[int]
    MATCH_STEPS_FIELD_NUMBER: _ClassVar[int]
    EDIT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_ERRORS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    png: _containers.RepeatedScalarFieldContainer[bytes]
    image_size: int
    timings_ms: _containers.ScalarMap[str, float]
    degrees: _containers.RepeatedCompositeFieldContainer[AttributeDegrees]
    reached: bool
    match_steps: int
    edit: Edit
    blocks: int
    block_errors: int
    digest: str
    def __init__(self, png: _Optional[_Iterable[bytes]] = ..., image_size: _Optional[int] = ..., timings_ms: _Optional[_Mapping[str, float]] = ..., degrees: _Optional[_Iterable[_Union[AttributeDegrees, _Mapping]]] = ..., reached: _Optional[bool] = ..., match_steps: _Optional[int] = ..., edit: _Optional[_Union[Edit, _Mapping]] = ..., blocks: _Optional[int] = ..., block_errors: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...
