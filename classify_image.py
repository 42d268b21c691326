"""Classifies image files with a model that write_pb.py wrote, or with a checkpoint.

  python classify_image.py --graph frozen_model_xception.pb a.jpg b.png photos
  python classify_image.py --graph frozen_model_xception.tflite --json a.jpg

Prints the most probable classes of every image. The model is a .pb, a SavedModel
folder, a .tflite or an .onnx file with labels.txt beside it. Images are converted
as create_tfrecords.py does and then preprocessed as in evaluation. Files that are not
images are reported on standard error, the others are classified, and the exit code
is 1.

  python classify_image.py --log_dir log --explain explained a.jpg b.png photos

classifies with the newest checkpoint of a training run, and writes a picture for each
image into the folder `explained`, which shows where the network sees the most probable
classes (Grad-CAM).

A .pb is a program: load only files that you or someone you trust made.
"""

import argparse
import codecs
import collections
import concurrent.futures
import contextlib
import csv
import glob
import itertools
import json
import os
import signal
import sys
import threading

import slim_bridge  # noqa: F401, before TensorFlow: see there

import numpy as np
import tensorflow.compat.v1 as tf
import tqdm

from common import arguments
from common import checkpoints
from common import errors
from evaluation import explainer
from evaluation import grad_cam
from export import models
from records import image_files

STANDARD_INPUT = '-'
MAX_FILE_BYTES = 256 * 2**20
NUM_THREADS = 2  # for decoding
MAX_EXPLAINED = 3  # classes in a picture of --explain

Result = collections.namedtuple('Result', [
    'file',  # name
    'predictions',  # list of dicts {label, name, probability}, the most probable first
    'error',  # why the file could not be classified, or None
    'image',  # the model's input; None after an error
    'picture',  # path of the picture that explains the predictions, or None
], defaults=[None, None])


def find_files(patterns):
  """Expands the folders and patterns of the command line.

  Args:
    patterns: files, `-`, folders to search with their sub-folders, and patterns
      like 'photos/*.jpg', which may match folders too.

  Returns:
    List of file names in the given order; those from a folder or a pattern are
    sorted. Whatever does not exist is kept, to be reported later.
  """
  files = []
  for pattern in patterns:
    matches = [pattern]
    if pattern != STANDARD_INPUT and not os.path.lexists(pattern) and glob.has_magic(pattern):
      matches = sorted(glob.glob(pattern, recursive=True))
    # A pattern with ** matches both folders and what is in them, which is taken once.
    found = dict.fromkeys(file for match in matches for file in (
        _images_below(match) if os.path.isdir(match) else [match]))
    files.extend(found or [pattern])
  return files


def _images_below(folder):
  def fail(error):
    raise error

  files, visited = [], set()
  for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
    status = os.stat(parent)
    if (status.st_dev, status.st_ino) in visited:
      folders.clear()  # a link back to a folder seen before
      continue
    visited.add((status.st_dev, status.st_ino))
    folders.sort()
    paths = [os.path.join(parent, name) for name in sorted(names)
             if name.lower().endswith(image_files.SUFFIXES) and not name.startswith('.')]
    # A broken link is reported; a pipe would block.
    files.extend(path for path in paths if os.path.isfile(path) or not os.path.exists(path))
  return files


def read_file(name):
  """Returns the bytes of a file, or of standard input.

  Raises:
    image_files.ImageError: it cannot be read, or has more than MAX_FILE_BYTES.
  """
  try:
    if name == STANDARD_INPUT and sys.stdin is None:
      raise image_files.ImageError('standard input is closed')
    if name == STANDARD_INPUT:
      content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    elif os.path.isdir(name):
      raise image_files.ImageError('the folder contains no image')
    else:
      with open(name, 'rb') as f:
        content = f.read(MAX_FILE_BYTES + 1)
  except OSError as error:
    raise image_files.ImageError(f'it cannot be read: {error.strerror}') from error
  if len(content) > MAX_FILE_BYTES:
    raise image_files.ImageError(f'it has more than {MAX_FILE_BYTES} bytes')
  return content


class ImageLoader:
  """Loads image files as a model's input; safe to call from several threads."""

  def __init__(self, image_size):
    """Initializes the loader for images of image_size, or for encoded images if it is None."""
    self._convert = image_files.Converter()
    self._preprocess = models.Preprocessor(image_size) if image_size else bytes
    # Preprocessing the largest image takes 1.5 GB, so one at a time.
    self._lock = threading.Lock()

  def __call__(self, name):
    """Returns float32 [image_size, image_size, 3] in [-1, 1], or bytes.

    Raises:
      image_files.ImageError: the file is not a usable image.
    """
    # The bytes that create_tfrecords.py would store in a record.
    encoded, _, _, _ = self._convert(read_file(name))
    try:
      with self._lock:
        return self._preprocess(encoded)
    except tf.errors.OpError as error:
      raise image_files.ImageError(f'it cannot be preprocessed: {error.message}') from error


def classify(model, files, batch_size, top_k):
  """Classifies files in batches, decoding the next batch at the same time.

  Args:
    model: models.FrozenModel or explainer.Explainer.
    files: iterable of file names.
    batch_size: files per batch.
    top_k: predictions per image.

  Yields:
    The Result of every file, in order.
  """
  load = ImageLoader(model.image_size)
  files = iter(files)
  with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
    def start_batch():
      return [(name, pool.submit(load, name)) for name in itertools.islice(files, batch_size)]

    batch = start_batch()
    while batch:
      next_batch = start_batch()
      yield from _classify_batch(model, batch, top_k)
      batch = next_batch


def _classify_batch(model, batch, top_k):
  errors = [future.exception() for _, future in batch]
  images = [future.result() for (_, future), error in zip(batch, errors) if error is None]
  outputs = iter(())
  if images:
    outputs = zip(images, model.predict(np.stack(images) if model.image_size else images))
  for (name, _), error in zip(batch, errors):
    if error is None:
      image, probabilities = next(outputs)
      if np.isnan(probabilities).any():
        yield Result(name, [], 'the model predicts NaN: its weights may have diverged in training')
      else:
        yield Result(name, _top_predictions(probabilities, model.class_names, top_k), None, image)
    elif isinstance(error, image_files.ImageError):
      yield Result(name, [], str(error))
    else:
      raise error


def _top_predictions(probabilities, class_names, top_k):
  labels = np.argsort(-probabilities, kind='stable')[:top_k]
  return [{'label': int(label), 'name': class_names[label],
           'probability': float(probabilities[label])} for label in labels]


@contextlib.contextmanager
def hold_back_interrupts():
  """Lets Ctrl-C take effect at the end of a block: callbacks of Matplotlib would swallow it."""
  received = []
  handler = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, handler)
  if received:
    signal.raise_signal(signal.SIGINT)


def explain(model, result, path):
  """Writes the picture that explains a Result to `path`; returns the Result with the path."""
  shown = result.predictions[:MAX_EXPLAINED]
  with hold_back_interrupts():
    model.write_picture(path, result.image, [prediction['label'] for prediction in shown],
                        [prediction['probability'] for prediction in shown])
  return result._replace(picture=path)


def print_text(result):
  print(f'{result.file}: ' + ', '.join(
      f'{prediction["name"]} {prediction["probability"]:.4f}'
      for prediction in result.predictions)
        + (f' -> {result.picture}' if result.picture else ''), flush=True)


def print_json(result):
  line = {'file': result.file, 'predictions': result.predictions}
  if result.picture:
    line['picture'] = result.picture
  print(json.dumps(line), flush=True)


def print_csv(result):
  writer = csv.writer(sys.stdout, lineterminator='\n')
  for rank, prediction in enumerate(result.predictions, 1):
    writer.writerow([result.file, rank, *prediction.values()])
  sys.stdout.flush()


def encode_unencodable(error):
  """Error handler of standard output for characters that its encoding lacks.

  A byte of a file name that is not text is printed as it is, anything else as
  an escape like \\u5411.
  """
  character = error.object[error.start]
  handler = 'surrogateescape' if '\udc80' <= character <= '\udcff' else 'backslashreplace'
  return character.encode(error.encoding, handler), error.start + 1


def parse_args(argv=None):
  parser = argparse.ArgumentParser(
      description=__doc__.split('\n')[0],
      epilog='A .pb is a program: load only files that you or someone you trust made.',
      formatter_class=arguments.HelpFormatter)
  parser.add_argument('images', nargs='+', metavar='IMAGE',
                      help='file, folder, pattern like "photos/*.jpg", or - for standard input')
  one_of = parser.add_mutually_exclusive_group(required=True)
  one_of.add_argument('--graph', type=arguments.path,
                      help='.pb, SavedModel folder, .tflite or .onnx that write_pb.py wrote')
  one_of.add_argument('--log_dir', '--train_dir', type=arguments.path,
                      help='folder of a training run, whose newest checkpoint is used, or one '
                      'checkpoint, like log/model.ckpt-1000')
  parser.add_argument('--top_k', type=arguments.positive_int, default=5,
                      help='number of classes to print per image')
  parser.add_argument('--batch_size', type=arguments.positive_int, default=8,
                      help='images per step; changes speed and memory, not the result')
  parser.add_argument('--precision', choices=models.PRECISIONS, default='float32',
                      help='bfloat16 runs a .pb or a SavedModel in bfloat16, which is fast on '
                      'CPUs with AVX512_BF16 or AMX')
  group = parser.add_argument_group('checkpoints')
  group.add_argument('--use_averages', choices=['auto', 'yes', 'no'], default='auto',
                     help='whether to use the Polyak averages of the weights; auto: if the '
                     'checkpoint has them')
  group.add_argument('--explain', type=arguments.path, metavar='FOLDER',
                     help='writes a PNG file for each image into this folder, which shows the '
                     f'parts that speak for its {MAX_EXPLAINED} most probable classes (Grad-CAM)')
  group.add_argument('--explain_layer', metavar='LAYER',
                     help='layer whose output --explain weighs, such as block4_dws_conv1; earlier '
                     'layers are finer but tell less about the class '
                     f'(default: {grad_cam.DEFAULT_LAYER})')
  group.add_argument('--overwrite', action='store_true',
                     help='replaces existing files in the folder of --explain')
  group = parser.add_mutually_exclusive_group()
  group.add_argument('--json', dest='print_result', action='store_const', const=print_json,
                     default=print_text,
                     help='prints one JSON object per line: file, predictions')
  group.add_argument('--csv', dest='print_result', action='store_const', const=print_csv,
                     default=print_text,
                     help='prints one prediction per line: file, rank, label, name, probability')
  args = parser.parse_args(argv)
  if args.graph and (args.explain is not None or args.use_averages != 'auto'):
    parser.error('--graph has frozen weights and computes no gradients: leave out --use_averages '
                 'and --explain, or give the --log_dir that it was frozen from')
  if args.explain is None and (args.explain_layer or args.overwrite):
    parser.error('--explain_layer and --overwrite need --explain')
  if args.log_dir and args.precision != 'float32':
    parser.error(f'--precision {args.precision} is for frozen models: give --graph')
  return args


def main(args):
  """Classifies the files on the command line; returns the exit code."""
  if sys.stdout is None:
    raise OSError('standard output is closed')
  files = find_files(args.images)
  paths = itertools.repeat(None)
  if args.explain is not None:
    paths = explainer.plan_pictures(files, args.explain, args.overwrite)
  model = models.load(args.graph, args.precision) if args.graph else explainer.Explainer(
      checkpoints.find(args.log_dir), args.use_averages,
      args.explain_layer or grad_cam.DEFAULT_LAYER)
  codecs.register_error('classify_image', encode_unencodable)
  sys.stdout.reconfigure(errors='classify_image')
  if args.print_result is print_csv:
    print('file,rank,label,name,probability')
  num_errors = 0
  is_hidden = sys.stdout.isatty() or not sys.stderr.isatty()
  with tqdm.tqdm(total=len(files), unit=' images', disable=is_hidden) as progress:
    for result, path in zip(classify(model, files, args.batch_size, args.top_k), paths):
      progress.update()
      if result.error is None:
        args.print_result(explain(model, result, path) if path else result)
      else:
        num_errors += 1
        progress.write(f'classify_image.py: {result.file}: {result.error}', file=sys.stderr)
  if num_errors:
    print(f'classify_image.py: {num_errors} of {len(files)} files could not be classified',
          file=sys.stderr)
  return 1 if num_errors else 0


if __name__ == '__main__':
  tf.disable_v2_behavior()
  tf.enable_resource_variables()
  try:
    sys.exit(main(parse_args()))
  except BrokenPipeError:
    # The reader has closed the pipe, and flushing at exit would fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
  except (models.ModelError, checkpoints.CheckpointError, grad_cam.LayerError, OSError) as error:
    sys.exit(f'classify_image.py: {error}')
  except tf.errors.ResourceExhaustedError as error:
    sys.exit('classify_image.py: out of memory '
             f'({errors.reason(error)}): use a smaller --batch_size')
  except KeyboardInterrupt:
    sys.exit('classify_image.py: interrupted')
