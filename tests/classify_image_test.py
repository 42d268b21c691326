"""Tests of classify_image.py: which files it takes, as which pixels, and what it prints."""

import contextlib
import csv
import io
import json
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from unittest import mock

import numpy as np
from PIL import Image
import tensorflow.compat.v1 as tf

import classify_image
from common import checkpoints
from export import freeze
from export import models
from records import flowers
from records import image_files
from scripts import DATASET_DIR
from scripts import PROJECT
import small_model


def drawn_flowers(count):
  """Returns the bytes of the first validation images."""
  dataset = flowers.get_split('validation', DATASET_DIR)
  return [tf.train.Example.FromString(dataset.records[i]).features.feature[
      'image/encoded'].bytes_list.value[0] for i in range(count)]


class ClassifyImageTest(tf.test.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model_dir = tempfile.mkdtemp()
    cls.addClassCleanup(shutil.rmtree, cls.model_dir)
    checkpoint = small_model.write_checkpoint(cls.model_dir)
    graph_def, predict, _ = freeze.freeze(checkpoint, checkpoints.load_config(checkpoint))
    cls.predict = staticmethod(predict)
    cls.pb = freeze.write_drafts(graph_def, small_model.CLASS_NAMES, {'pb': 'model.pb'},
                                 cls.model_dir)['pb']

  def setUp(self):
    super().setUp()
    self.dir = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, self.dir)

  def test_files_folders_patterns_standard_input(self):
    for name in ('b.jpg', 'a.PNG', 'notes.txt', '.hidden.jpg', 'sub/c.webp', '[1].jpg'):
      path = self.dir / name
      path.parent.mkdir(exist_ok=True)
      path.write_bytes(b'')
    os.mkfifo(self.dir / 'pipe.jpg')

    def find(*patterns):
      return [os.path.relpath(file, self.dir) if file != '-' else file
              for file in classify_image.find_files([
                  pattern if pattern == '-' else str(self.dir / pattern)
                  for pattern in patterns])]

    self.assertEqual(find(''), ['[1].jpg', 'a.PNG', 'b.jpg', 'sub/c.webp'])
    self.assertEqual(find('notes.txt', '-', 'b.jpg'), ['notes.txt', '-', 'b.jpg'])
    self.assertEqual(find('*.txt', '**/*.webp'), ['notes.txt', 'sub/c.webp'])
    self.assertEqual(find('s*', '[a-z]*/**'), ['sub/c.webp', 'sub/c.webp'])
    self.assertEqual(find('[1].jpg'), ['[1].jpg'])  # a file's name comes before a pattern
    self.assertEqual(find('none.jpg', '*.gif'), ['none.jpg', '*.gif'])
    (self.dir / 'empty').mkdir()
    self.assertEqual(find('empty'), ['empty'])

  def test_folders_are_searched_through_links(self):
    outside = self.dir / 'outside'
    folder = self.dir / 'folder'
    for path in (outside / 'a.jfif', outside / 'b.AVIF', folder / 'c.jpe'):
      path.parent.mkdir(exist_ok=True)
      path.write_bytes(b'')
    (folder / 'link').symlink_to(outside)
    (outside / 'cycle').symlink_to(folder)
    (folder / 'broken.jpg').symlink_to('nowhere')
    self.assertEqual(
        [os.path.relpath(file, folder) for file in classify_image.find_files([str(folder)])],
        ['broken.jpg', 'c.jpe', 'link/a.jfif', 'link/b.AVIF'])

  def test_results_equal_those_of_evaluation(self):
    expected, labels = small_model.validation_images()
    load = classify_image.ImageLoader(small_model.IMAGE_SIZE)
    for i, content in enumerate(drawn_flowers(10)):
      path = self.dir / f'{i}.jpg'
      path.write_bytes(content)
      self.assertAllEqual(load(str(path)), expected[i])
    model = models.load(self.pb)
    files = classify_image.find_files([str(self.dir)])
    results = list(classify_image.classify(model, files, batch_size=4, top_k=5))
    self.assertEqual([result.file for result in results], files)
    self.assertEqual([result.predictions[0]['label'] for result in results],
                     labels[:10].tolist())
    for result, probabilities in zip(results, self.predict(expected[:10])):
      found = {prediction['label']: prediction['probability'] for prediction in result.predictions}
      self.assertAllClose([found[label] for label in range(5)], probabilities, atol=1e-5)
      self.assertEqual([prediction['name'] for prediction in result.predictions],
                       [small_model.CLASS_NAMES[prediction['label']]
                        for prediction in result.predictions])
      self.assertEqual(sorted(found.values(), reverse=True), list(found.values()))

  def test_every_kind_of_image_is_preprocessed_as_in_evaluation(self):
    image = Image.open(io.BytesIO(drawn_flowers(1)[0])).convert('RGB')
    exif = Image.Exif()
    exif[image_files.EXIF_ORIENTATION] = 6
    kinds = [('JPEG', image, {}), ('JPEG', image.convert('L'), {}),
             ('JPEG', image.convert('CMYK'), {}), ('JPEG', image, {'exif': exif}),
             ('PNG', image, {}), ('PNG', image.convert('RGBA'), {}),
             ('PNG', image.quantize(16), {}),
             ('GIF', image, {}), ('BMP', image, {}), ('WEBP', image, {}), ('TIFF', image, {})]
    convert, load = image_files.Converter(), classify_image.ImageLoader(small_model.IMAGE_SIZE)
    split = flowers.shard_name('validation', 0, 1)
    with tf.python_io.TFRecordWriter(str(self.dir / split)) as writer:
      for i, (image_format, picture, options) in enumerate(kinds):
        picture.save(self.dir / str(i), image_format, **options)
        encoded, kind, height, width = convert((self.dir / str(i)).read_bytes())
        writer.write(flowers.make_example(encoded, kind, 0, height, width).SerializeToString())
    (self.dir / 'labels.txt').write_text('0:daisy\n')
    with tf.Graph().as_default(), tf.Session() as session:
      evaluated, _ = session.run(flowers.load_batch(
          flowers.get_split('validation', str(self.dir)), len(kinds), 71, 71, is_training=False))
    self.assertLen(evaluated, len(kinds))
    for i, pixels in enumerate(evaluated):
      self.assertAllEqual(load(str(self.dir / str(i))), pixels)

  def test_bad_files_are_named_and_the_rest_is_classified(self):
    good = drawn_flowers(1)[0]
    (self.dir / 'good.jpg').write_bytes(good)
    (self.dir / 'cut.jpg').write_bytes(good[:len(good) // 2])
    (self.dir / 'text.png').write_bytes(b'hello')
    (self.dir / 'empty').mkdir()
    with open(self.dir / 'large.png', 'wb') as f:
      f.truncate(classify_image.MAX_FILE_BYTES + 1)
    names = ['good.jpg', 'cut.jpg', 'text.png', 'none.jpg', 'empty', 'large.png', 'good.jpg']
    model = models.load(self.pb)
    for batch_size in (1, 3, 100):
      results = list(classify_image.classify(
          model, [str(self.dir / name) for name in names], batch_size, top_k=1))
      self.assertEqual([os.path.basename(result.file) for result in results], names)
      self.assertEqual([len(result.predictions) for result in results], [1, 0, 0, 0, 0, 0, 1])
      for result, message in zip(results, [
          None, 'cannot be decoded', 'it is not an image', 'cannot be read: No such file',
          'the folder contains no image', 'more than 268435456 bytes', None]):
        if message:
          self.assertIn(message, result.error)
        else:
          self.assertIsNone(result.error)

  def test_images_for_which_the_model_predicts_nan(self):
    for name, content in zip('ab', drawn_flowers(2)):
      (self.dir / name).write_bytes(content)
    model = models.FrozenModel(list('cde'), 71, {}, lambda batch: np.float32(
        [[0.2, np.nan, 0.5], [0.2, 0.3, 0.5]]))
    first, second = classify_image.classify(
        model, [str(self.dir / name) for name in 'ab'], batch_size=2, top_k=1)
    self.assertEqual((first.predictions, first.error),
                     ([], 'the model predicts NaN: its weights may have diverged in training'))
    self.assertEqual((second.predictions[0]['name'], second.error), ('e', None))

  def run_script(self, *options, model=None, **kwargs):
    model = model or ['--graph', self.pb]
    return subprocess.run(
        [sys.executable, os.path.join(PROJECT, 'classify_image.py'), *model, *options],
        cwd=self.dir, capture_output=True, timeout=300, **kwargs)

  def test_json(self):
    flower = drawn_flowers(1)[0]
    (self.dir / 'a.jpg').write_bytes(flower)
    Image.open(io.BytesIO(flower)).save(self.dir / 'b.png')
    odd_name = os.fsdecode(b'caf\xe9,"1".jpg')
    (self.dir / odd_name).write_bytes(flower)
    (self.dir / 'bad.jpg').write_bytes(b'bad')
    result = self.run_script('--json', 'a.jpg', 'b.png', 'bad.jpg', '-', odd_name, input=flower)
    self.assertEqual(result.returncode, 1)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    self.assertEqual([line['file'] for line in lines], ['a.jpg', 'b.png', '-', odd_name])
    for line in lines:
      self.assertEqual(list(line), ['file', 'predictions'])
      self.assertLen(line['predictions'], 5)
      self.assertEqual(list(line['predictions'][0]), ['label', 'name', 'probability'])
    errors = result.stderr.decode()
    self.assertIn('classify_image.py: bad.jpg: it is not an image\n', errors)
    self.assertIn('1 of 5 files could not be classified', errors)
    self.assertNotIn('Traceback', errors)

  def test_csv_and_text(self):
    (self.dir / 'a, b.jpg').write_bytes(drawn_flowers(1)[0])
    result = self.run_script('--csv', '--top_k', '2', 'a, b.jpg')
    self.assertEqual(result.returncode, 0, result.stderr)
    header, first, second = csv.reader(result.stdout.decode().splitlines())
    self.assertEqual(header, ['file', 'rank', 'label', 'name', 'probability'])
    self.assertEqual((first[:2], second[:2]), (['a, b.jpg', '1'], ['a, b.jpg', '2']))
    self.assertEqual(small_model.CLASS_NAMES[int(first[2])], first[3])
    self.assertGreater(float(first[4]), float(second[4]))
    result = self.run_script('--top_k', '1', '.')
    self.assertEqual(result.stdout.decode(),
                     f'./a, b.jpg: {first[3]} {float(first[4]):.4f}\n')

  def test_output_without_unicode(self):
    folder = self.dir / 'model'
    shutil.copytree(self.model_dir, folder)
    (folder / 'labels.txt').write_text(
        '0:向日葵\n1:向日葵1\n2:向日葵2\n3:向日葵3\n4:向日葵4\n', 'utf-8')
    (folder / 'model.json').unlink(missing_ok=True)
    name = os.fsdecode(b'caf\xe9.jpg')
    (self.dir / name).write_bytes(drawn_flowers(1)[0])
    for encoding in ('ascii', 'cp1252'):
      result = self.run_script(name, '--top_k', '1', model=['--graph', str(folder / 'model.pb')],
                               env={**os.environ, 'PYTHONIOENCODING': encoding})
      self.assertEqual(result.returncode, 0, result.stderr)
      self.assertRegex(result.stdout, rb'^caf\xe9.jpg: \\u5411\\u65e5\\u8475\d? [01]')

  def test_mistakes(self):
    result = self.run_script('a.jpg', model=['--graph', 'none.pb'])
    self.assertEqual(result.returncode, 1)
    self.assertIn(b'classify_image.py: There is no model none.pb', result.stderr)
    self.assertNotIn(b'Traceback', result.stderr)

  def test_closed_input_and_output(self):
    with mock.patch.object(sys, 'stdin', None):
      with self.assertRaisesRegex(image_files.ImageError, 'standard input is closed'):
        classify_image.read_file('-')
    with mock.patch.object(sys, 'stdout', None):
      with self.assertRaisesRegex(OSError, 'standard output is closed'):
        classify_image.main(classify_image.parse_args(['a.jpg', '--graph', self.pb]))

  def test_options_that_exclude_each_other(self):
    for options in ([], ['--graph', 'a.pb', '--log_dir', 'log'],
                    ['--graph', 'a.pb', '--explain', 'out'],
                    ['--graph', 'a.pb', '--use_averages', 'no'],
                    ['--log_dir', 'log', '--explain_layer', 'block4_dws_conv1'],
                    ['--log_dir', 'log', '--overwrite'],
                    ['--log_dir', 'log', '--precision', 'bfloat16']):
      with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        classify_image.parse_args(['a.jpg', *options])

  def test_ctrl_c_while_a_picture_is_drawn(self):
    self.addCleanup(signal.signal, signal.SIGINT,
                    signal.signal(signal.SIGINT, signal.default_int_handler))
    model = mock.Mock()

    def draw(*_):
      signal.raise_signal(signal.SIGINT)
      model.write_rest()

    model.write_picture.side_effect = draw
    with self.assertRaises(KeyboardInterrupt):
      classify_image.explain(model, classify_image.Result('a.jpg', [], None), 'a.png')
    model.write_rest.assert_called_once()
    self.assertEqual(signal.getsignal(signal.SIGINT), signal.default_int_handler)

  def test_interrupted(self):
    argv = ['classify_image.py', '--graph', self.pb, 'a.jpg']
    with mock.patch.object(sys, 'argv', argv), \
         mock.patch.object(models, 'load', side_effect=KeyboardInterrupt), \
         self.assertRaisesRegex(SystemExit, '^classify_image.py: interrupted$'):
      runpy.run_path(os.path.join(PROJECT, argv[0]), run_name='__main__')

  def test_explanations(self):
    first, second = drawn_flowers(2)
    for name, content in [('a/x.jpg', first), ('b/x.jpg', second), ('bad.jpg', b'bad')]:
      path = self.dir / name
      path.parent.mkdir(exist_ok=True)
      path.write_bytes(content)
    names = ['a/x.jpg', 'bad.jpg', 'b/x.jpg']
    explain = ['--json', '--explain', 'out', *names]
    result = self.run_script(*explain, model=['--log_dir', self.model_dir])
    self.assertEqual(result.returncode, 1, result.stderr)
    self.assertIn(b'classify_image.py: bad.jpg: it is not an image\n', result.stderr)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    self.assertEqual([(line['file'], line['picture']) for line in lines],
                     [('a/x.jpg', 'out/x.png'), ('b/x.jpg', 'out/x_2.png')])
    self.assertCountEqual(os.listdir(self.dir / 'out'), ['x.png', 'x_2.png'])
    pixels, _ = small_model.validation_images()
    for line, probabilities in zip(lines, self.predict(pixels[:2])):
      found = {prediction['label']: prediction['probability']
               for prediction in line['predictions']}
      self.assertAllClose([found[label] for label in range(5)], probabilities, atol=1e-5)
      with Image.open(self.dir / line['picture']) as picture:
        self.assertEqual(picture.size, (1200, 330))  # the image and 3 classes
    result = self.run_script(*explain, model=['--log_dir', self.model_dir])
    self.assertEqual(result.returncode, 1)
    self.assertIn(b'classify_image.py: out/x.png exists: choose another folder', result.stderr)
    self.assertNotIn(b'Traceback', result.stderr)

  def test_hostile_images(self):
    # By default, tests/hostile_images.py has 10,000 images and takes minutes.
    result = subprocess.run(
        [sys.executable, os.path.join(PROJECT, 'tests', 'hostile_images.py'), '--graph', self.pb,
         '--num_images', '300', '--num_bombs', '1'],
        capture_output=True, text=True, timeout=300)
    self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
    self.assertRegex(result.stdout, r'300 images, twice: \d+ classified, \d+ refused')
