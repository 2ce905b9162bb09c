"""All errors that callers may want to handle, as one tree, with the HTTP status of each.

AfterimageError
  - BitstreamError          the bitstream cannot be decoded           (422)
    · MalformedHeader       empty, or shorter than its header         (400)
    · UnsupportedCodec      unknown format, version, model or metric  (415)
    · LengthMismatch        lengths or shapes contradict each other   (422)
    · ChecksumMismatch      a checksum does not match                 (422)
    · CorruptStream         entropy-coded bytes that no encoder makes (422)
    · DesynchronisedStream  the decoder ends in an unexpected state   (422)
    · WrongWeights          encoded with weights not installed here   (422)
  - PictureTooLarge         more pixels than the limit                (413)
  - PictureError            the picture cannot be read or written     (422)
    · UnsupportedPicture    the picture's file format is not read     (415)
  - ParameterError          tier, seed, quality … out of range        (422)
  - Quarantined             the bitstream crashed two workers         (422)
  - Unavailable             a helper process is busy or has died      (503)
  - Canceled                the caller no longer wants the picture
  - WeightsError            a weights file is missing or altered      (500)
"""

from typing import ClassVar


class AfterimageError(Exception):
    """Base class of all errors in this project. Its message may be shown to clients.

    `kind` is the last part of the `type` in a problem response. It is public and never changes.
    """

    kind: ClassVar[str] = "afterimage-error"


class BitstreamError(AfterimageError):
    """The bitstream cannot be decoded."""

    kind = "bitstream-error"


class MalformedHeader(BitstreamError):
    """The bitstream is empty or shorter than a header."""

    kind = "malformed-header"


class UnsupportedCodec(BitstreamError):
    """The bitstream has a format, version, model, metric or profile that is not supported."""

    kind = "unsupported-codec"


class LengthMismatch(BitstreamError):
    """Lengths or shapes in the header contradict each other or the number of bytes."""

    kind = "length-mismatch"


class ChecksumMismatch(BitstreamError):
    """A checksum in the bitstream does not match its contents."""

    kind = "checksum-mismatch"


class CorruptStream(BitstreamError):
    """The entropy-coded bytes end early or hold values that no encoder writes."""

    kind = "corrupt-stream"


class DesynchronisedStream(BitstreamError):
    """All symbols were read, but the entropy decoder did not end in the encoder's start state."""

    kind = "desynchronised-stream"


class WrongWeights(BitstreamError):
    """The bitstream was encoded with weights that are not installed."""

    kind = "wrong-weights"


class PictureTooLarge(AfterimageError):
    """The picture has more pixels, or a longer side, than the limit."""

    kind = "picture-too-large"
    pixels = 0
    """The number of pixels that the file declares; 0 if it is not known."""


class PictureError(AfterimageError):
    """The picture cannot be read, encoded or written."""

    kind = "picture-error"


class UnsupportedPicture(PictureError):
    """The picture's file format or sample depth is not supported."""

    kind = "unsupported-picture"


class ParameterError(AfterimageError):
    """A parameter is outside its documented range."""

    kind = "parameter-error"


class Quarantined(AfterimageError):
    """Two workers crashed while they decoded this bitstream; it is refused for a day."""

    kind = "quarantined"


class Unavailable(AfterimageError):
    """A helper process of the service is busy or has died; try again later."""

    kind = "unavailable"


class Canceled(AfterimageError):
    """The caller no longer wants the picture."""

    kind = "canceled"


class WeightsError(AfterimageError):
    """A weights file is missing, altered or does not fit its network."""

    kind = "weights-error"
