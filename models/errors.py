"""Every error a caller may want to tell apart, as one tree.

AfterimageError
  - BitstreamError          the client's bytes are wrong              (422)
    · MalformedHeader       nothing, or less than a header            (400)
    · UnsupportedCodec      a magic, model or metric we do not know   (415)
    · LengthMismatch        lengths or shapes that contradict         (422)
    · ChecksumMismatch      a checksum that does not hold             (422)
    · CorruptStream         entropy coded bytes that cannot be        (422)
    · DesynchronisedStream  they decode, but not to what was encoded  (422)
    · WrongWeights          coded with weights that we do not have    (422)
  - PictureTooLarge         more declared pixels than the limit       (413)
  - PictureError            a picture that cannot be encoded          (422)
    · UnsupportedPicture    not a picture format we read              (415)
  - ParameterError          tier, seed, quality … out of range        (422)
  - Quarantined             the bitstream ended two workers           (422)
  - Canceled                the caller no longer wants the picture
  - WeightsError            ours are missing or altered               (500)
"""


class AfterimageError(Exception):
    """Base of all errors of this project; its text is fit to be shown to a client."""


class BitstreamError(AfterimageError):
    """The bitstream is wrong."""


class MalformedHeader(BitstreamError):
    """Nothing, or less than a header."""


class UnsupportedCodec(BitstreamError):
    """A magic, version, model, metric or profile that we do not decode."""


class LengthMismatch(BitstreamError):
    """Declared lengths or shapes contradict each other or the bytes present."""


class ChecksumMismatch(BitstreamError):
    """A checksum in the bitstream does not hold."""


class CorruptStream(BitstreamError):
    """The entropy coded bytes end early or hold impossible values."""


class DesynchronisedStream(BitstreamError):
    """The entropy decoder did not end where every encoder begins."""


class WrongWeights(BitstreamError):
    """The bitstream was made with other weights than ours."""


class PictureTooLarge(AfterimageError):
    """More pixels than the limit."""


class PictureError(AfterimageError):
    """A picture that cannot be read or encoded."""


class UnsupportedPicture(PictureError):
    """Not a picture format that we read."""


class ParameterError(AfterimageError):
    """A parameter outside its published range."""


class Quarantined(AfterimageError):
    """Two workers died while they drew from this bitstream: it is refused for a day."""


class Canceled(AfterimageError):
    """The caller no longer wants the picture."""


class WeightsError(AfterimageError):
    """Weights are missing or altered."""
