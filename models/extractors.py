"""Low-level extractors of IMDL-BenCo: what a network may see beside the RGB image, edges, noise or high frequencies.

All take the ImageNet-normalised image (B, 3, H, W) of any size to maps (B, n, H, W), float32 also under autocast; n is
the attribute `channels`. Only the kernel of Bayar is trained. State-dict names are those of IMDL-BenCo's checkpoints.

    from .extractors import EXTRACTORS
    extractor = EXTRACTORS["srm"]()      # sobel, srm, bayar, fft or dct
    x = torch.cat((image, extractor(image)), 1)  # (B, 3 + extractor.channels, H, W)

The values are the published ones. Where those are undefined, these aren't: images of one colour give about 0 in place
of NaN (fft, dct), pixels without an edge pass the gradient 0 in place of infinity (sobel), and kernels whose neighbours
sum to 0 stay finite (bayar).
"""
import torch
import torch.nn.functional as F
from torch import nn

from .dct import HighPass, rescale
from .filters import SOBEL_X, SOBEL_Y, SobelConv, WholeBayarConv, srm_bank

LOW = 0.1  # share of each side's frequencies that count as low


class Extractor(nn.Module):
    """Calls `extract` in float32, whatever autocast says: its differences of near pixels are small."""

    channels = 3

    def forward(self, image):
        with torch.autocast(image.device.type, enabled=False):
            return self.extract(image.float())


class Sobel(Extractor):
    """Magnitude of the gradient of R + G + B."""

    channels = 1

    def __init__(self):
        super().__init__()
        # Checkpoints hold each kernel twice, the first time unused and with the other sign.
        self.sobel_x = nn.Sequential(SobelConv(3, SOBEL_X))
        self.sobel_y = nn.Sequential(SobelConv(3, SOBEL_Y))
        self.conv_x = SobelConv(3, [row[::-1] for row in SOBEL_X])
        self.conv_y = SobelConv(3, SOBEL_Y[::-1])

    def extract(self, image):
        grey = image.sum(1, keepdim=True)
        gradient = torch.cat((self.conv_x(grey), self.conv_y(grey)), 1)
        return torch.linalg.vector_norm(gradient, dim=1, keepdim=True)  # whose own gradient at 0 is 0


class SRM(Extractor):
    """Noise residuals of three high-pass kernels: channel 3k + c is kernel k on colour c."""

    channels = 9

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", srm_bank())

    def extract(self, image):
        return F.conv2d(image, self.weight, padding=2)


class Bayar(Extractor):
    """Constrained convolution, which is trained; see filters.constrained."""

    def __init__(self):
        super().__init__()
        centre = torch.zeros(5, 5)
        centre[2, 2] = 1
        self.register_buffer("bayar_mask", 1 - centre)  # both only because checkpoints hold them
        self.register_buffer("bayar_final", -centre)
        self.BayarConv2D = WholeBayarConv(3, 3, padding=2)
        self.BayarConv2D.reset_parameters()  # of both signs, as published

    def extract(self, image):
        return self.BayarConv2D(image)


class FFT(Extractor):
    """The image without a tenth of its frequencies along each axis, the lowest, rescaled to 0..1."""

    def extract(self, image):
        spectrum = torch.fft.fftshift(torch.fft.fft2(image), dim=(2, 3))
        rows, columns = (slice(side // 2 - int(LOW * side) // 2, side // 2 + int(LOW * side) // 2)
                         for side in image.shape[2:])
        spectrum[..., rows, columns] = 0  # one more below frequency 0 than above, as published
        return rescale(torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(2, 3))).real)


class DCT(HighPass):
    """The image without the lowest tenth of its frequencies along each axis, rescaled to 0..1."""

    channels = 3

    def __init__(self):
        super().__init__(LOW)


EXTRACTORS = {"sobel": Sobel, "srm": SRM, "bayar": Bayar, "fft": FFT, "dct": DCT}
