"""What ffmpeg is told: codec, pixel format and options, checked before anything is computed."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from diffsynth.errors import ArgumentError
from diffsynth.video.ffmpeg import pyav

DEFAULT_QUALITY = 9

_CONTAINERS = MappingProxyType(
    {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm", ".gif": "gif"}
)
_CODECS = MappingProxyType({".webm": "libvpx-vp9", ".gif": "gif"})  # all others: libx264
_ALIASES = MappingProxyType(
    {"h264": "libx264", "h265": "libx265", "hevc": "libx265", "vp9": "libvpx-vp9", "av1": "libsvtav1"}
)
# encoder -> the name of its constant-quality option and the worst value that it takes; 0 is the best
_QUALITY_OPTION = MappingProxyType(
    {
        "libx264": ("crf", 51),
        "libx265": ("crf", 51),
        "libvpx-vp9": ("crf", 63),
        "libsvtav1": ("crf", 63),
        "h264_nvenc": ("cq", 51),
        "hevc_nvenc": ("cq", 51),
        "av1_nvenc": ("cq", 51),
    }
)
_EXTRA = MappingProxyType(
    {
        # On CPUs with AVX-512 libx264 reads memory that nobody wrote (mbtree, where a row is no multiple of 8
        # blocks of 16 pixels), and the same frames make other files each time. Its plain C does not.
        "libx264": {"x264-params": "cpu-independent=1"},
        "libx265": {"x265-params": "log-level=error"},
        "libvpx-vp9": {
            "b": "0",
            "row-mt": "1",
            "deadline": "good",
            "cpu-used": "4",
        },  # b=0: crf alone decides
        "libsvtav1": {"preset": "8"},
    }
)
_PIX_FMTS = MappingProxyType({"gif": "pal8", "prores_ks": "yuv422p10le"})  # all others: yuv420p


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """One way to write a video; made by `choose_encoding`."""

    container: str  # ffmpeg's name of the format
    codec: str  # ffmpeg's name of the encoder
    pix_fmt: str
    options: Mapping[str, str]  # of the encoder
    container_options: Mapping[str, str]

    def check_size(self, width: int, height: int) -> None:
        """Make sure that a frame of this size (pixels) can be written as it is.

        Raises:
            ArgumentError: for an odd size where the pixel format shares colours between neighbours.
        """
        import av

        form = av.VideoFormat(self.pix_fmt)
        steps = [("width", width, form.chroma_width(2) == 1), ("height", height, form.chroma_height(2) == 1)]
        odd = [f"{name} {size}" for name, size, is_halved in steps if is_halved and size % 2]
        if odd:
            raise ArgumentError(
                f"{' and '.join(odd)} cannot be written: {self.pix_fmt} needs even sizes. Make the frames "
                'even, or pass pix_fmt="yuv444p", which takes any size (browsers may not play it).'
            )


def choose_encoding(
    suffix: str,
    *,
    quality: float | None = None,
    crf: float | None = None,
    codec: str | None = None,
    pix_fmt: str | None = None,
    ffmpeg_params: Sequence[str] | None = None,
) -> Encoding:
    """Decide how a video is written, and try the encoder on a small picture size.

    Args:
        suffix: of the file, with its dot, in lower case.
        quality: v1's measure, 10 is best, 1 is smallest; CRF = int((1 - quality / 10) * 51); default 9.
        crf: the codec's own measure instead; 0 is best, up to 51 (H.264, H.265) or 63 (VP9, AV1).
        codec: ffmpeg's name of an encoder, or h264, h265, vp9, av1; default by ``suffix``.
        pix_fmt: default yuv420p, what every player shows.
        ffmpeg_params: options in ffmpeg's form, such as ["-preset", "slow"]; they win over the others.

    Raises:
        ArgumentError: when a value is out of range, when two of them contradict each other, or when this
            machine's ffmpeg has no such encoder or option.

    Source: quality to CRF: DiffSynth-Studio v1 (imageio-ffmpeg), 5 -> 25, 9 -> 5.
    """
    given = _parse_params(ffmpeg_params or ())
    codec = given.pop("codec", codec) or _CODECS.get(suffix, "libx264")
    codec = _ALIASES.get(codec, codec)
    pix_fmt = given.pop("pix_fmt", pix_fmt) or _PIX_FMTS.get(codec, "yuv420p")
    container_options = {"movflags": "use_metadata_tags"} if suffix == ".mov" else {}
    if suffix in (".mp4", ".m4v", ".mov"):
        flags = [*container_options.values(), given.pop("movflags", "faststart").lstrip("+")]
        container_options = {"movflags": "+".join(flags)}
    options = {**_EXTRA.get(codec, {}), **_quality_option(codec, quality, crf, given), **given}
    encoding = Encoding(
        container=_CONTAINERS[suffix],
        codec=codec,
        pix_fmt=pix_fmt,
        options=options,
        container_options=container_options,
    )
    _try_encoder(encoding, suffix)
    return encoding


def frame_rate(fps: float | Fraction) -> Fraction:
    """Return ``fps`` as a fraction that ffmpeg takes (29.97 is 2997/100).

    Raises:
        ArgumentError: when it is not between 0 and 1000 frames per second.
    """
    if isinstance(fps, bool) or not 0 < fps <= 1000:
        raise ArgumentError(
            f"fps is {fps}; give frames per second above 0 and up to 1000 (Wan is trained at 16)."
        )
    return Fraction(fps).limit_denominator(1001)


def scaling(*names: str) -> int:
    """Return ffmpeg's flags for changing pixel formats; an older PyAV knows fewer of them."""
    from av.video.reformatter import Interpolation

    return sum({int(getattr(Interpolation, name, 0)) for name in names})


def _quality_option(
    codec: str, quality: float | None, crf: float | None, given: Mapping[str, str]
) -> dict[str, str]:
    name, worst = _QUALITY_OPTION.get(codec, ("", 0))
    if quality is not None and crf is not None:
        raise ArgumentError(f"quality={quality} and crf={crf} are two names of one thing; give one of them.")
    if (quality is not None or crf is not None) and not name:
        raise ArgumentError(f"codec {codec} has no quality scale; leave quality and crf out.")
    if quality is not None and not 0 <= quality <= 10:
        raise ArgumentError(f"quality is {quality}; give 1 (smallest file) to 10 (best), usual are 5 to 9.")
    if crf is not None and not 0 <= crf <= worst:
        raise ArgumentError(f"crf is {crf}; give 0 (best) to {worst} (smallest file) for {codec}.")
    if not name or any(option in given for option in (name, "qp", "b")):
        return {}
    if crf is None:
        crf = int((1 - (DEFAULT_QUALITY if quality is None else quality) / 10) * worst)
    return {name: str(crf)}


def _parse_params(params: Sequence[str]) -> dict[str, str]:
    """["-preset", "slow", "-b:v", "2M"] as a mapping of ffmpeg's own option names."""
    names, values = [str(name) for name in params[::2]], [str(value) for value in params[1::2]]
    is_pairs = len(names) == len(values) and all(name.startswith("-") for name in names)
    if isinstance(params, str) or not is_pairs:
        raise ArgumentError(
            f'ffmpeg_params is {params!r}; give names and values in turn: ["-preset", "slow"].'
        )
    renamed = {"c": "codec", "vcodec": "codec", "vb": "b"}
    bare = [name.removeprefix("-").removesuffix(":v") for name in names]
    return {renamed.get(name, name): value for name, value in zip(bare, values, strict=True)}


def _try_encoder(encoding: Encoding, suffix: str) -> None:
    """Open the encoder once, so that what it refuses is known before the first frame is made."""
    av = pyav()
    from av.video.codeccontext import VideoCodecContext

    os.environ.setdefault("SVT_LOG", "1")  # errors only; AV1's encoder otherwise fills the terminal
    try:
        context: Any = VideoCodecContext.create(encoding.codec, "w")
    except (av.FFmpegError, ValueError) as error:
        raise ArgumentError(
            f"codec {encoding.codec!r} is not in this build of ffmpeg; use libx264, libx265, libvpx-vp9 or "
            "libsvtav1 (diffsynth doctor lists those that work here)."
        ) from error
    formats = [form.name for form in context.codec.video_formats or ()]
    if encoding.pix_fmt not in formats:
        raise ArgumentError(
            f"codec {encoding.codec} cannot hold {encoding.pix_fmt!r}; it takes {', '.join(formats)}."
        )
    with av.open(io.BytesIO(), "w", format=encoding.container) as container:
        fits = context.codec.canonical_name in container.supported_codecs
    if not fits:
        raise ArgumentError(
            f"a {suffix} file cannot hold {encoding.codec}; use .mp4 or .mkv, or leave codec out."
        )
    context.width, context.height, context.pix_fmt = 256, 256, encoding.pix_fmt
    context.time_base, context.options = Fraction(1, 16), dict(encoding.options)
    try:
        context.open()
    except av.FFmpegError as error:
        raise ArgumentError(
            f"codec {encoding.codec} does not start here with {dict(encoding.options)}: {error}. "
            "Check ffmpeg_params, or use codec='libx264'."
        ) from error
    unknown = ", ".join(context.options)  # what the encoder did not take
    if unknown:
        raise ArgumentError(f"encoder {encoding.codec} has no option {unknown} (from ffmpeg_params).")
