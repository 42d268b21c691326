"""Prints the images per second of timm's legacy_xception on PyTorch."""

import argparse
import statistics
import time

import timm
import torch
import torch._inductor.config

WARM_UP_STEPS = 3
NUM_CLASSES = 5

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('--mode', choices=['train', 'inference'], required=True)
parser.add_argument('--precision', choices=['float32', 'bfloat16'], required=True)
parser.add_argument('--batch_size', type=int, required=True)
parser.add_argument('--image_size', type=int, required=True)
parser.add_argument('--depth_multiplier', type=float, default=1.0, help='scales all widths')
parser.add_argument('--steps', type=int, required=True)
parser.add_argument('--compile', action='store_true', help='torch.compile')
parser.add_argument('--freeze', action='store_true',
                    help='lets torch.compile fold batch norms and fix the layout of weights')
args = parser.parse_args()


def scale(width):
  return round(width * args.depth_multiplier)


def scaled(module):
  """Returns a convolution, batch norm or linear layer with its widths scaled."""
  if isinstance(module, torch.nn.Conv2d):
    return torch.nn.Conv2d(
        3 if module.in_channels == 3 else scale(module.in_channels), scale(module.out_channels),
        module.kernel_size, module.stride, module.padding,
        groups=1 if module.groups == 1 else scale(module.groups), bias=False)
  if isinstance(module, torch.nn.BatchNorm2d):
    return torch.nn.BatchNorm2d(scale(module.num_features))
  return torch.nn.Linear(scale(module.in_features), NUM_CLASSES)


images = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
images = images.to(memory_format=torch.channels_last)
labels = torch.arange(args.batch_size) % NUM_CLASSES
model = timm.create_model('legacy_xception', num_classes=NUM_CLASSES)
for name, module in list(model.named_modules()):
  if isinstance(module, (torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.Linear)):
    model.set_submodule(name, scaled(module))
model = model.to(memory_format=torch.channels_last)
model.train(args.mode == 'train')
torch._inductor.config.freezing = args.freeze
forward = torch.compile(model) if args.compile else model
optimizer = torch.optim.Adam(model.parameters())


def step():
  with torch.autocast('cpu', torch.bfloat16, enabled=args.precision == 'bfloat16'):
    if args.mode == 'inference':
      with torch.inference_mode():
        forward(images)
      return
    loss = torch.nn.functional.cross_entropy(forward(images), labels)
  optimizer.zero_grad()
  loss.backward()
  optimizer.step()


seconds = []
for _ in range(WARM_UP_STEPS + args.steps):
  start = time.perf_counter()
  step()
  seconds.append(time.perf_counter() - start)
print(args.batch_size / statistics.median(seconds[WARM_UP_STEPS:]))
