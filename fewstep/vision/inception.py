"""The Inception-v3 network of the Fréchet inception distance, for the weights of December 2015.

Szegedy et al., arXiv 1512.00567, with the three differences of the graph that Heusel et al. (arXiv
1706.08500) measured with: average pooling does not count padding, the last block pools by maximum, and there
are 1008 classes. Modules are named as in torchvision, so that the published state dict loads as it is.
"""

import os
import zipfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

from fewstep.errors import FewstepError

FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
SHA256_PREFIX = "6726825d"  # also the ending of the published names, by the convention of torch.hub
VARIABLE = "FEWSTEP_INCEPTION"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILES[0]}"  # 95.6 MB


def find_weights(path: str | Path | None = None) -> Path:
    """The weights file: `path`, else `$FEWSTEP_INCEPTION`, else torch.hub's cache. Nothing is downloaded.

    Raises:
        FewstepError: no file; the message says where one was looked for and which one is wanted.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    given = path or os.environ.get(VARIABLE)
    candidates = [Path(given)] if given else [cache / name for name in FILES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FewstepError(
        f"the Inception weights are not at {' nor '.join(map(str, candidates))}: download {URL} "
        f"(95.6 MB) and name it with --weights or ${VARIABLE}, or use --extractor effnet-lite0"
    )


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of TorchScript, such as the inception-2015-12-05.pt of StyleGAN and clean-fid."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.partition("/")[2].startswith("code/") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


class ConvBlock(nn.Module):
    """Convolution, normalisation, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: bool = True,
    ):
        super().__init__()
        size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        pad = (size[0] // 2, size[1] // 2) if padding else 0
        self.conv = nn.Conv2d(inputs, outputs, size, stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu_()


Shrink = partial(ConvBlock, kernel_size=3, stride=2, padding=False)


def average(x: Tensor) -> Tensor:
    """3 x 3 mean over the pixels that exist."""
    return avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class BlockA(nn.Module):
    """35 x 35: 1x1, 5x5, double 3x3 and pooled branches."""

    def __init__(self, inputs: int, pooled: int):
        super().__init__()
        self.branch1x1 = ConvBlock(inputs, 64, 1)
        self.branch5x5_1 = ConvBlock(inputs, 48, 1)
        self.branch5x5_2 = ConvBlock(48, 64, 5)
        self.branch3x3dbl_1 = ConvBlock(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvBlock(64, 96, 3)
        self.branch3x3dbl_3 = ConvBlock(96, 96, 3)
        self.branch_pool = ConvBlock(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(average(x))], 1)


class BlockB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = Shrink(inputs, 384)
        self.branch3x3dbl_1 = ConvBlock(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvBlock(64, 96, 3)
        self.branch3x3dbl_3 = Shrink(96, 96)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, max_pool2d(x, 3, 2)], 1)


class BlockC(nn.Module):
    """17 x 17: convolutions of 7 split into rows and columns."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.branch1x1 = ConvBlock(inputs, 192, 1)
        self.branch7x7_1 = ConvBlock(inputs, width, 1)
        self.branch7x7_2 = ConvBlock(width, width, (1, 7))
        self.branch7x7_3 = ConvBlock(width, 192, (7, 1))
        self.branch7x7dbl_1 = ConvBlock(inputs, width, 1)
        self.branch7x7dbl_2 = ConvBlock(width, width, (7, 1))
        self.branch7x7dbl_3 = ConvBlock(width, width, (1, 7))
        self.branch7x7dbl_4 = ConvBlock(width, width, (7, 1))
        self.branch7x7dbl_5 = ConvBlock(width, 192, (1, 7))
        self.branch_pool = ConvBlock(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average(x))], 1)


class BlockD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3_1 = ConvBlock(inputs, 192, 1)
        self.branch3x3_2 = Shrink(192, 320)
        self.branch7x7x3_1 = ConvBlock(inputs, 192, 1)
        self.branch7x7x3_2 = ConvBlock(192, 192, (1, 7))
        self.branch7x7x3_3 = ConvBlock(192, 192, (7, 1))
        self.branch7x7x3_4 = Shrink(192, 192)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat(
            [self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven), max_pool2d(x, 3, 2)], 1
        )


class BlockE(nn.Module):
    """8 x 8: branches that end in two heads."""

    def __init__(self, inputs: int, pool_by_maximum: bool):
        super().__init__()
        self.pool_by_maximum = pool_by_maximum
        self.branch1x1 = ConvBlock(inputs, 320, 1)
        self.branch3x3_1 = ConvBlock(inputs, 384, 1)
        self.branch3x3_2a = ConvBlock(384, 384, (1, 3))
        self.branch3x3_2b = ConvBlock(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvBlock(inputs, 448, 1)
        self.branch3x3dbl_2 = ConvBlock(448, 384, 3)
        self.branch3x3dbl_3a = ConvBlock(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvBlock(384, 384, (3, 1))
        self.branch_pool = ConvBlock(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        heads = [
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
        ]
        pooled = max_pool2d(x, 3, 1, 1) if self.pool_by_maximum else average(x)
        return torch.cat([self.branch1x1(x), *heads, self.branch_pool(pooled)], 1)


class Inception(nn.Module):
    """Images (B, 3, 299, 299) in -1..1 to features (B, 2048) before the classifier."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Shrink(3, 32)
        self.Conv2d_2a_3x3 = ConvBlock(32, 32, 3, padding=False)
        self.Conv2d_2b_3x3 = ConvBlock(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBlock(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBlock(80, 192, 3, padding=False)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128)
        self.Mixed_6c = BlockC(768, 160)
        self.Mixed_6d = BlockC(768, 160)
        self.Mixed_6e = BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, pool_by_maximum=False)
        self.Mixed_7c = BlockE(2048, pool_by_maximum=True)
        self.fc = nn.Linear(2048, 1008)

    def first_part(self, x: Tensor) -> Tensor:
        """To (B, 768, 17, 17), before what TensorFlow's graph calls mixed_6."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(max_pool2d(x, 3, 2))))
        return self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))

    def spatial(self, x: Tensor) -> Tensor:
        """To (B, 192, 17, 17), what that graph calls mixed_6/conv."""
        return self.Mixed_6d.branch1x1(self.first_part(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.Mixed_6e(self.Mixed_6d(self.first_part(x)))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
