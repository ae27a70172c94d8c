"""HRNet and its building blocks: residual blocks, the multi-resolution module and the transition between stages.

Deep High-Resolution Representation Learning for Visual Recognition. Wang, Sun, Cheng, et al. TPAMI 2020.
Paper: https://arxiv.org/abs/1908.07919    Original code: https://github.com/HRNet (MIT)

Parallel branches hold the image's features at several sizes, branch i at half the size of branch i-1, and exchange
information at the end of every module. Parameter names are those of the HRNet ImageNet classifiers, so their files
load. The maps of all branches are a list of tensors (B, C_i, H_i, W_i), finest first.
"""
import torch.nn.functional as F
from torch import nn

BN_MOMENTUM = 0.01  # HRNet's own; PyTorch's default is 0.1


def conv_bn(c_in, c_out, kernel_size, stride=1):
    """Return [convolution without bias, batch norm]: the size is kept, or halved (rounded up) with stride 2."""
    return [
        nn.Conv2d(c_in, c_out, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(c_out, momentum=BN_MOMENTUM),
    ]


def conv_bn_relu(c_in, c_out, kernel_size, stride=1):
    """Return the layers of `conv_bn`, then a ReLU, as one module."""
    return nn.Sequential(*conv_bn(c_in, c_out, kernel_size, stride), nn.ReLU(inplace=True))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, c_in, H, W) -> (B, channels, H, W)."""

    expansion = 1

    def __init__(self, c_in, channels):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(c_in, channels, 3)
        self.conv2, self.bn2 = conv_bn(channels, channels, 3)
        self.downsample = nn.Sequential(*conv_bn(c_in, channels, 1)) if c_in != channels else nn.Identity()

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution and a shortcut: (B, c_in, H, W) -> (B, expansion * channels, H, W)."""

    expansion = 4

    def __init__(self, c_in, channels):
        super().__init__()
        c_out = self.expansion * channels
        self.conv1, self.bn1 = conv_bn(c_in, channels, 1)
        self.conv2, self.bn2 = conv_bn(channels, channels, 3)
        self.conv3, self.bn3 = conv_bn(channels, c_out, 1)
        self.downsample = nn.Sequential(*conv_bn(c_in, c_out, 1)) if c_in != c_out else nn.Identity()

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


def residual_layer(block, c_in, channels, num_blocks):
    """Return `num_blocks` blocks in a row; the first one changes the number of channels."""
    c_out = block.expansion * channels
    return nn.Sequential(block(c_in, channels), *(block(c_out, channels) for _ in range(num_blocks - 1)))


class HRModule(nn.Module):
    """Residual blocks in every branch; then every branch receives the sum of all branches, brought to its own size.

    Args:
        channels: channels of the branches, finest first
        num_blocks: residual blocks in each branch
        align_corners: enlarge coarser branches with corner pixels on corner pixels
    """

    def __init__(self, channels, num_blocks=4, align_corners=False):
        super().__init__()
        self.align_corners = align_corners
        self.branches = nn.ModuleList(residual_layer(BasicBlock, c, c, num_blocks) for c in channels)
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(self._path(channels, j, i) for j in range(len(channels))) for i in range(len(channels))
        )

    @staticmethod
    def _path(channels, j, i):
        """Return the layers that bring branch j to the channels (and, if finer, to the size) of branch i."""
        if j == i:
            return nn.Identity()
        if j > i:  # coarser: enlarged in forward, after these
            return nn.Sequential(*conv_bn(channels[j], channels[i], 1))
        steps = [conv_bn_relu(channels[j], channels[j], 3, stride=2) for _ in range(i - j - 1)]
        return nn.Sequential(*steps, nn.Sequential(*conv_bn(channels[j], channels[i], 3, stride=2)))

    def forward(self, maps):
        maps = [branch(x) for branch, x in zip(self.branches, maps)]
        return [self._fuse(maps, i) for i in range(len(maps))]

    def _fuse(self, maps, i):
        total = None
        for j, path in enumerate(self.fuse_layers[i]):
            y = path(maps[j])
            if j > i:
                # Autocast on CUDA enlarges in float32, in which the sum and all later maps would stay.
                y = F.interpolate(y, maps[i].shape[-2:], mode="bilinear", align_corners=self.align_corners).to(y.dtype)
            total = y if total is None else total + y
        return F.relu(total, inplace=True)


def stage(num_modules, channels, **options):
    """Return `num_modules` HR modules in a row: list of maps -> list of maps of the same shapes."""
    return nn.Sequential(*(HRModule(channels, **options) for _ in range(num_modules)))


class Transition(nn.ModuleList):
    """From the maps of one stage to those of the next, which may have one branch more.

    A branch whose number of channels changes goes through a 3x3 convolution, and one that keeps it is left as it is.
    The new branch is made from the coarsest old one, at half its size.
    """

    def __init__(self, old_channels, new_channels):
        paths = []
        for i, c_new in enumerate(new_channels):
            if i == len(old_channels):
                paths.append(nn.Sequential(conv_bn_relu(old_channels[-1], c_new, 3, stride=2)))
            elif c_new == old_channels[i]:
                paths.append(nn.Identity())
            else:
                paths.append(conv_bn_relu(old_channels[i], c_new, 3))
        super().__init__(paths)

    def forward(self, maps):
        return [path(maps[min(i, len(maps) - 1)]) for i, path in enumerate(self)]


class HRNet(nn.Module):
    """The network without a head: image (B, 3, H, W) -> maps of all four branches.

    Args:
        channels: channels of the four branches, finest first
        stem_stride: stride of each of the two convolutions before the first stage
        num_bottlenecks: residual blocks of the first stage
        num_modules: HR modules of the other three stages
        options: those of HRModule
    """

    def __init__(self, channels, stem_stride, num_bottlenecks, num_modules, **options):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 64, 3, stem_stride)
        self.conv2, self.bn2 = conv_bn(64, 64, 3, stem_stride)
        self.layer1 = residual_layer(Bottleneck, 64, 64, num_bottlenecks)
        self.transition1 = Transition((Bottleneck.expansion * 64,), channels[:2])
        self.stage2 = stage(num_modules[0], channels[:2], **options)
        self.transition2 = Transition(channels[:2], channels[:3])
        self.stage3 = stage(num_modules[1], channels[:3], **options)
        self.transition3 = Transition(channels[:3], channels)
        self.stage4 = stage(num_modules[2], channels, **options)

    def forward(self, image):
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        maps = self.transition1([self.layer1(x)])
        maps = self.transition2(self.stage2(maps))
        maps = self.transition3(self.stage3(maps))
        return self.stage4(maps)


def initialise(network):
    """Draw the weights of all convolutions as HRNet does before its training."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.001)
