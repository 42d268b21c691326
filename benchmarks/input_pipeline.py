"""Speed of the input pipeline, alone or compared with slim's and Keras'."""

import functools
import io
import os
import tempfile
import time

import slim_bridge  # noqa: F401, before TensorFlow: see there

from PIL import Image
import tensorflow.compat.v1 as tf
import tf_slim as slim

from benchmarks import network
from benchmarks import peers
from benchmarks import rounds
from deployment import towers
from records import flowers
import xception_preprocessing

IMAGE_SIZE = 299
BATCH_SIZE = 32
NUM_BATCHES = 40  # timed after WARM_UP_BATCHES, which fill the buffers
WARM_UP_BATCHES = 8
JPEG_SIDE, JPEG_QUALITY = 500, 90  # like the flower photographs

# The training step of `make train`.
TRAIN_IMAGE_SIZE, TRAIN_DEPTH_MULTIPLIER, TRAIN_BATCH_SIZE = 128, 0.5, 16
NUM_TRAIN_STEPS = 30

KERAS_PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'keras_input.py')


def write_jpegs(folder):
  """Writes the shipped flowers as 500-pixel JPEGs, into a TFRecord and into class folders."""
  dataset = flowers.get_split('train', network.DATASET_DIR)
  read = flowers.RecordReader(dataset)
  for name in dataset.labels_to_names.values():
    os.makedirs(os.path.join(folder, 'files', name))
  with open(os.path.join(folder, flowers.LABELS_FILE), 'w', encoding='utf-8') as f:
    f.writelines(f'{label}:{name}\n' for label, name in dataset.labels_to_names.items())
  path = os.path.join(folder, flowers.shard_name('train', 0, 1))
  with tf.python_io.TFRecordWriter(path) as writer:
    for number in range(dataset.num_samples):
      pixels, label = read(number)
      image = Image.fromarray(pixels)
      scale = JPEG_SIDE / max(image.size)
      image = image.resize((round(image.width * scale), round(image.height * scale)),
                           Image.BICUBIC)
      encoded = io.BytesIO()
      image.save(encoded, 'JPEG', quality=JPEG_QUALITY)
      writer.write(flowers.make_example(encoded.getvalue(), 'jpg', label, image.height,
                                        image.width).SerializeToString())
      with open(os.path.join(folder, 'files', dataset.labels_to_names[label],
                             f'{number}.jpg'), 'wb') as f:
        f.write(encoded.getvalue())


def operations_of(tensors):
  """Returns what computes the tensors; running it does not copy them out of the session."""
  return [tensor.op for tensor in tensors]


def time_batches(operations, num_batches, batch_size, devices=('/cpu:0',)):
  """Runs operations in a session; returns the images per second after a warm-up."""
  with tf.Session(config=towers.session_config(devices)) as session:
    towers.initialize(session)
    coordinator = tf.train.Coordinator()
    threads = (tf.train.start_queue_runners(session, coordinator)
               if tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS) else [])
    for _ in range(WARM_UP_BATCHES):
      session.run(operations)
    start = time.perf_counter()
    for _ in range(num_batches):
      session.run(operations)
    seconds = time.perf_counter() - start
    coordinator.request_stop()
    coordinator.join(threads)
  return num_batches * batch_size / seconds


def time_load_batch(folder):
  """Returns the images per second of `flowers.load_batch`."""
  with tf.Graph().as_default():
    batch = flowers.load_batch(flowers.get_split('train', folder), BATCH_SIZE, IMAGE_SIZE,
                               IMAGE_SIZE, is_training=True)
    return time_batches(operations_of(batch), NUM_BATCHES, BATCH_SIZE)


def time_slim_provider(folder):
  """Returns the images per second of slim's DatasetDataProvider and queue runners."""
  with tf.Graph().as_default(), tf.device('/cpu:0'):
    provider = slim.dataset_data_provider.DatasetDataProvider(
        flowers.get_split('train', folder), num_readers=4,
        common_queue_capacity=20 * BATCH_SIZE, common_queue_min=10 * BATCH_SIZE)
    image, label = provider.get(['image', 'label'])
    image = xception_preprocessing.preprocess_for_train(
        image, IMAGE_SIZE, IMAGE_SIZE, add_image_summaries=False)
    batch = tf.train.batch([image, label], BATCH_SIZE, num_threads=4, capacity=5 * BATCH_SIZE)
    return time_batches(operations_of(batch), NUM_BATCHES, BATCH_SIZE)


def time_keras(folder):
  """Returns the images per second of Keras' image_dataset_from_directory and its layers."""
  return float(peers.run_program(
      [KERAS_PROGRAM, os.path.join(folder, 'files'),
       *map(str, (IMAGE_SIZE, BATCH_SIZE, WARM_UP_BATCHES, NUM_BATCHES))]))


def time_training(real_images):
  """Returns the images per second of training on the shipped flowers, or on one batch."""
  devices = towers.tower_devices()
  with tf.Graph().as_default():
    step = network.build_training_step(TRAIN_BATCH_SIZE, TRAIN_IMAGE_SIZE, TRAIN_DEPTH_MULTIPLIER,
                                       devices, 'float32', real_images)
    return time_batches([step.train_op], NUM_TRAIN_STEPS, TRAIN_BATCH_SIZE, devices)


def measure(batch_size, image_size, num_steps):
  """Measures `flowers.load_batch`; returns the dict of `network.figures`."""
  with tempfile.TemporaryDirectory() as folder, tf.Graph().as_default():
    write_jpegs(folder)
    start = time.perf_counter()
    batch = flowers.load_batch(flowers.get_split('train', folder), batch_size, image_size,
                               image_size, is_training=True)
    operations = operations_of(batch)
    graph_seconds = time.perf_counter() - start
    start = time.perf_counter()
    with tf.Session(config=towers.session_config(['/cpu:0'])) as session:
      session.run(operations)
      first_step_seconds = time.perf_counter() - start
      for _ in range(WARM_UP_BATCHES):
        session.run(operations)
      seconds = network.time_steps(lambda: session.run(operations), num_steps)
    return network.figures(seconds, batch_size, graph_seconds, first_step_seconds)


def compare(num_rounds):
  """Measures the input pipeline and its peers; returns a dict of medians and ratios."""
  with tempfile.TemporaryDirectory() as folder:
    write_jpegs(folder)
    rates = rounds.take_turns({
        'images_per_second': functools.partial(time_load_batch, folder),
        'slim_images_per_second': functools.partial(time_slim_provider, folder),
        'keras_images_per_second': functools.partial(time_keras, folder),
        'training_images_per_second': functools.partial(time_training, real_images=True),
        'synthetic_training_images_per_second': functools.partial(
            time_training, real_images=False),
    }, num_rounds)
  return {
      **rates,
      'ratio_to_slim': rates['images_per_second'] / rates['slim_images_per_second'],
      'ratio_to_keras': rates['images_per_second'] / rates['keras_images_per_second'],
      'ratio_to_synthetic_training': (rates['training_images_per_second']
                                      / rates['synthetic_training_images_per_second']),
  }
