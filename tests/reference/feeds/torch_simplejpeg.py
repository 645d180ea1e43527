"""torch DataLoader over files, simplejpeg and OpenCV."""

from pathlib import Path
from typing import Any

from tests.reference.feeds.work import Decode, Epochs, Work, number_of

FORMATS = ("files",)


class Files:
    """A map-style dataset."""

    def __init__(self, work: Work) -> None:
        self.folder, self.names = Path(work.place("files/train")), work.names("files/train", "*.jpg")
        self.decode = Decode()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        name = self.names[index]
        return self.decode((self.folder / name).read_bytes()), number_of(name)


def open_feed(work: Work) -> Epochs:
    from torch.utils.data import DataLoader

    loader = DataLoader(Files(work), work.batch, shuffle=True, num_workers=work.workers, persistent_workers=True)
    return lambda epoch: iter(loader)
