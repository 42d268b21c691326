"""Plots the losses that several runs of training printed.

  python -m benchmarks.loss_curves --outputs one.txt two.txt \
      --names "one worker" "two workers" --picture docs/cluster_loss.png
"""

import argparse
import re

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

LINE = re.compile(r'^global step (\d+)/\d+: loss = ([\d.]+)', re.MULTILINE)


def read_losses(path):
  """Returns the steps and losses of the progress lines in a file."""
  with open(path, encoding='utf-8') as f:
    steps, losses = zip(*LINE.findall(f.read()))
  return [int(step) for step in steps], [float(loss) for loss in losses]


def main(args):
  figure, axes = plt.subplots(figsize=(8, 4), dpi=100)
  for i, (path, name) in enumerate(zip(args.outputs, args.names)):
    # The first curve is broad and pale, so that it remains visible under the others.
    axes.plot(*read_losses(path), label=name, linewidth=1 if i else 4, alpha=1 if i else 0.4)
  axes.set_xlabel('step')
  axes.set_ylabel('total loss')
  axes.legend()
  figure.tight_layout()
  figure.savefig(args.picture)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--outputs', nargs='+', required=True, help='output of the runs')
  parser.add_argument('--names', nargs='+', required=True, help='names of the curves')
  parser.add_argument('--picture', required=True, help='the PNG file to write')
  main(parser.parse_args())
