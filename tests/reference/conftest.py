"""Before diffusers and lpips look for torchvision."""

from benchmarks import torchvision_import

torchvision_import.import_first()
