"""Prints the images per second of timm's legacy_xception on PyTorch."""

import argparse
import statistics
import time

import timm
import torch
import torch._inductor.config

WARM_UP_STEPS = 3

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('--mode', choices=['train', 'inference'], required=True)
parser.add_argument('--precision', choices=['float32', 'bfloat16'], required=True)
parser.add_argument('--batch_size', type=int, required=True)
parser.add_argument('--image_size', type=int, required=True)
parser.add_argument('--steps', type=int, required=True)
parser.add_argument('--compile', action='store_true', help='torch.compile')
parser.add_argument('--freeze', action='store_true',
                    help='lets torch.compile fold batch norms and fix the layout of weights')
args = parser.parse_args()

images = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
images = images.to(memory_format=torch.channels_last)
labels = torch.arange(args.batch_size) % 5
model = timm.create_model('legacy_xception', num_classes=5).to(memory_format=torch.channels_last)
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
