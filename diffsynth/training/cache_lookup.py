"""Which cached samples a run uses: the one answer, for encoding and for training.

A sample is a run's own where all that decided it is what the run would make it of (`Maker.facts_of`),
whatever was encoded last. Samples of another maker are never taken in its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from diffsynth.training.cache_hashes import FileHashes
from diffsynth.training.cache_keys import (
    OF_CLIP,
    Maker,
    agree,
    cached_files,
    folder_of,
    sample_path,
)
from diffsynth.training.dataset.clips import Clip
from diffsynth.training.samples import EncodedSample, SampleHeader


class CacheLookup:
    """The samples that lie beside the files of clips; each folder is listed once, each header read once.

    Args:
        clips: of the run.
        maker: how the run encodes.
        hashes: of files.
        cache_dir: as in `CacheConfig`.
    """

    def __init__(
        self, clips: Iterable[Clip], maker: Maker, hashes: FileHashes, cache_dir: str | None
    ) -> None:
        self.maker, self._hashes, self._cache_dir = maker, hashes, cache_dir
        self._files = cached_files(folder_of(clip.item.media, cache_dir) for clip in clips)
        self._headers: dict[Path, SampleHeader] = {}

    def wanted(self, clip: Clip) -> dict[str, str]:
        """What the clip's sample is made of, and its key; raises as `Maker.facts_of`."""
        return self.maker.facts_of(clip, self._hashes)

    def own(self, clip: Clip) -> list[SampleHeader]:
        """The run's sample of a clip, or none; several only where the run does not tell who its maker is.

        Raises:
            CheckpointError: for a damaged sample.
            OSError: when a file of the clip cannot be read.
        """
        wanted = self.wanted(clip)
        if "key" in wanted:
            path = sample_path(clip.item.media, wanted["key"], self._cache_dir)
            if path in self._paths(clip) and agree((header := self._header(path)).meta, wanted):
                return [header]
        found = [header for path in self._paths(clip) if agree((header := self._header(path)).meta, wanted)]
        return found[:1] if "key" in wanted else found

    def of_others(self, clip: Clip) -> list[SampleHeader]:
        """Samples of exactly this clip by whomever; raises as `own`."""
        wanted = {name: value for name, value in self.wanted(clip).items() if name in OF_CLIP}
        return [header for path in self._paths(clip) if agree((header := self._header(path)).meta, wanted)]

    def _paths(self, clip: Clip) -> list[Path]:
        return self._files.get((folder_of(clip.item.media, self._cache_dir), clip.item.media.name), [])

    def _header(self, path: Path) -> SampleHeader:
        if path not in self._headers:
            self._headers[path] = EncodedSample.header(path)
        return self._headers[path]
