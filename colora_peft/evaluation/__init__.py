"""Evaluation: PSNR and SSIM of restored images, and sheets of images before and after.

`evaluate` restores whole images of pairs and averages their figures. Figures are per image, in RGB on [0, 1], after
rounding to 8 bits.
"""

from .before_after import save_before_after
from .evaluate import evaluate, restore_some
from .metrics import SSIM_WINDOW_PX, psnr, ssim

__all__ = ["SSIM_WINDOW_PX", "evaluate", "psnr", "restore_some", "save_before_after", "ssim"]
