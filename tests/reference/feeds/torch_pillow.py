"""torch DataLoader over files, Pillow and torchvision's transforms: the way of its tutorials."""

from typing import Any

from tests.reference.feeds.work import SIDE, Epochs, Work, number_of

FORMATS = ("files",)


class Files:
    """A map-style dataset."""

    def __init__(self, work: Work) -> None:
        from torchvision.transforms import v2

        self.folder, self.names = work.place("files/train"), work.names("files/train", "*.jpg")
        self.change = v2.Compose([v2.RandomResizedCrop(SIDE), v2.RandomHorizontalFlip(), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        with Image.open(f"{self.folder}/{self.names[index]}") as image:
            return self.change(image.convert("RGB")), number_of(self.names[index])


def open_feed(work: Work) -> Epochs:
    from torch.utils.data import DataLoader

    loader = DataLoader(Files(work), work.batch, shuffle=True, num_workers=work.workers, persistent_workers=True)
    return lambda epoch: iter(loader)
