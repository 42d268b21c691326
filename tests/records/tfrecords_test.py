"""Tests of random access to TFRecord files that TensorFlow wrote."""

import gzip
import os
import shutil
import tempfile

import tensorflow.compat.v1 as tf

from records import tfrecords


class RecordsTest(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    self.dir = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.dir)

  def write(self, name, records):
    path = os.path.join(self.dir, name)
    with tf.python_io.TFRecordWriter(path) as writer:
      for record in records:
        writer.write(record)
    return path

  def change_byte(self, path, offset):
    with open(path, 'r+b') as f:
      f.seek(offset)
      byte = f.read(1)[0]
      f.seek(offset)
      f.write(bytes([byte ^ 1]))

  def test_reads_what_tensorflow_wrote(self):
    contents = [[b'first', b'', b'\0zeros\0'], [], [bytes(range(256)) * 500], [], []]
    paths = [self.write(f'{i}.tfrecord', content) for i, content in enumerate(contents)]
    records = tfrecords.Records(paths)
    self.assertLen(records, 4)
    self.assertEmpty(records.damages)
    self.assertEqual([records[i] for i in range(4)], [b'first', b'', b'\0zeros\0',
                                                      bytes(range(256)) * 500])
    self.assertEqual([records.locate(i) for i in range(4)],
                     [(paths[0], 0), (paths[0], 1), (paths[0], 2), (paths[2], 0)])

  def test_a_changed_byte_spoils_one_record(self):
    # Records of 10 bytes take 26: 12 of header, 10 of data, 4 of checksum.
    for offset in (26 + 12, 26 + 21, 26 + 22, 26 + 25):
      path = self.write('a.tfrecord', [b'0123456789'] * 3)
      self.change_byte(path, offset)
      records = tfrecords.Records([path])
      self.assertLen(records, 3)
      self.assertEqual((records[0], records[2]), (b'0123456789', b'0123456789'))
      with self.assertRaisesRegex(tfrecords.RecordError, 'its checksum is wrong'):
        _ = records[1]

  def test_a_damaged_length_loses_what_follows(self):
    for offset in (26, 26 + 7, 26 + 8, 26 + 11):
      path = self.write('a.tfrecord', [b'0123456789'] * 3)
      self.change_byte(path, offset)
      records = tfrecords.Records([path, self.write('b.tfrecord', [b'other'])])
      self.assertEqual([records[i] for i in range(len(records))], [b'0123456789', b'other'])
      self.assertEqual(records.damages, [
          f'{path}: the length of record 1 is damaged: that record and all after it are lost'])

  def test_a_file_cut_short(self):
    for size in (26 + 1, 26 + 12, 26 + 25):
      path = self.write('a.tfrecord', [b'0123456789'] * 3)
      os.truncate(path, size)
      records = tfrecords.Records([path])
      self.assertLen(records, 1)
      self.assertEqual(records.damages, [f'{path} ends inside record 1, which is lost'])

  def test_a_file_that_is_no_tfrecord(self):
    path = os.path.join(self.dir, 'a.tfrecord')
    for content in (b'<html><body>Not found</body></html>',
                    gzip.compress(open(self.write('b', [b'0123456789'] * 9), 'rb').read())):
      with open(path, 'wb') as f:
        f.write(content)
      records = tfrecords.Records([path, self.write('b', [b'other'])])
      self.assertEqual([records[i] for i in range(len(records))], [b'other'])
      self.assertEqual(records.damages, [
          f'{path} is compressed: unpack it with gzip -d' if content.startswith(b'\x1f') else
          f'{path} is not a TFRecord file, or it is compressed'])

  def test_a_file_that_changes_while_it_is_used(self):
    path = self.write('a.tfrecord', [b'0123456789'] * 3)
    records = tfrecords.Records([path])
    os.truncate(path, 26 + 15)
    with self.assertRaisesRegex(tfrecords.RecordError, 'checksum is wrong'):
      _ = records[1]
    os.remove(path)
    with self.assertRaisesRegex(tfrecords.RecordError, 'cannot be read: No such file'):
      _ = records[0]
