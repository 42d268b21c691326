"""Tests of the download against a server on this machine, and of hostile archives."""

import hashlib
import http.server
import io
import os
import shutil
import tarfile
import tempfile
import threading
from unittest import mock

import tensorflow.compat.v1 as tf

from create_tfrecords_test import image_bytes
import download_flowers
import flowers


def setUpModule():
  tf.disable_v2_behavior()
  tf.enable_resource_variables()


def make_archive(extra=()):
  """Bytes of an archive like flower_photos.tgz, of 2 classes of 4 images; `extra` members last."""
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode='w:gz') as tar:
    def add(name, content):
      member = tarfile.TarInfo(name)
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))

    add('flower_photos/LICENSE.txt', b'CC-BY')
    for label, name in enumerate(['daisy', 'roses']):
      for i in range(4):
        add(f'flower_photos/{name}/{i}.jpg', image_bytes([label, i]))
    for member in extra:
      tar.addfile(member, io.BytesIO(bytes(member.size)))
  return file.getvalue()


class Server(http.server.ThreadingHTTPServer):
  """Serves `content`; `requests` are the Range headers that came."""

  def __init__(self, content):
    super().__init__(('127.0.0.1', 0), Handler)
    self.content = content
    self.requests = []
    self.takes_ranges = True
    self.cut_after = None  # bytes, of the next response only
    self.status = 200
    threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):

  def do_GET(self):
    server = self.server
    requested = self.headers.get('Range')
    server.requests.append(requested)
    if server.status != 200:
      self.send_error(server.status)
      return
    start = 0
    if requested and server.takes_ranges:
      start = int(requested.removeprefix('bytes=').removesuffix('-'))
      if start >= len(server.content):
        self.send_error(416)
        return
    self.send_response(206 if requested and server.takes_ranges else 200)
    self.send_header('Content-Length', str(len(server.content) - start))
    self.end_headers()
    end = len(server.content) if server.cut_after is None else start + server.cut_after
    server.cut_after = None
    self.wfile.write(server.content[start:end])

  def log_message(self, *args):
    pass


class DownloadTest(tf.test.TestCase):

  def setUp(self):
    super().setUp()
    self.dir = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.dir)
    self.dataset_dir = os.path.join(self.dir, 'data')
    self.serve(make_archive())
    self.enterContext(mock.patch.object(download_flowers, 'FIRST_PAUSE_SECS', 0.01))

  def serve(self, content):
    self.server = Server(content)
    self.addCleanup(self.server.server_close)
    self.addCleanup(self.server.shutdown)
    self.url = f'http://127.0.0.1:{self.server.server_port}/flower_photos.tgz'

  def download(self, *args, url=None, sha256=None):
    sha256 = sha256 or hashlib.sha256(self.server.content).hexdigest()
    download_flowers.main(download_flowers.parse_args(
        ['--dataset_dir', self.dataset_dir, '--url', url or self.url, '--sha256', sha256,
         '--num_shards', '1', *args]))

  def check_dataset(self):
    self.assertCountEqual(os.listdir(self.dataset_dir), [
        'flower_photos', 'flower_photos.tgz', 'labels.txt',
        'flowers_train_00000-of-00001.tfrecord', 'flowers_validation_00000-of-00001.tfrecord'])
    self.assertEqual(flowers.get_split('train', self.dataset_dir).num_samples, 6)
    self.assertTrue(os.path.exists(os.path.join(self.dataset_dir, 'flower_photos/LICENSE.txt')))

  def write_part(self, content):
    os.mkdir(self.dataset_dir)
    with open(os.path.join(self.dataset_dir, 'flower_photos.tgz.part'), 'wb') as f:
      f.write(content)

  def test_from_nothing_to_a_dataset(self):
    self.download()
    self.check_dataset()
    self.assertEqual(self.server.requests, [None])
    self.download('--overwrite')  # everything is there
    self.assertLen(self.server.requests, 1)
    shutil.rmtree(os.path.join(self.dataset_dir, 'flower_photos'))
    self.download('--overwrite')  # the archive is there
    self.assertLen(self.server.requests, 1)
    self.check_dataset()

  def test_goes_on_where_it_was_interrupted(self):
    self.write_part(self.server.content[:1000])
    self.download()
    self.assertEqual(self.server.requests, ['bytes=1000-'])
    self.check_dataset()

  def test_a_part_that_is_complete(self):
    self.write_part(self.server.content)
    self.download()
    self.assertLen(self.server.requests, 1)
    self.check_dataset()

  def test_a_server_that_knows_no_ranges(self):
    self.server.takes_ranges = False
    self.write_part(self.server.content[:1000])
    self.download()
    self.check_dataset()

  def test_a_connection_that_is_cut(self):
    self.server.cut_after = 1500
    self.download()
    self.assertEqual(self.server.requests, [None, 'bytes=1500-'])
    self.check_dataset()

  def test_another_checksum(self):
    with self.assertRaisesRegex(download_flowers.DownloadError, f'not {"0" * 64}: it was removed'):
      self.download(sha256='0' * 64)
    self.assertEmpty(os.listdir(self.dataset_dir))

  def test_a_server_that_refuses(self):
    self.server.status = 404
    with self.assertRaisesRegex(download_flowers.DownloadError, 'HTTP Error 404.*--url'):
      self.download()
    self.assertLen(self.server.requests, download_flowers.ATTEMPTS)

  def test_no_server(self):
    self.server.shutdown()
    self.server.server_close()
    with self.assertRaisesRegex(download_flowers.DownloadError, 'Connection refused'):
      self.download()

  def test_a_local_file(self):
    path = os.path.join(self.dir, 'local.tgz')
    with open(path, 'wb') as f:
      f.write(self.server.content)
    self.download(url='file://' + path)
    self.check_dataset()
    self.assertEmpty(self.server.requests)

  def test_a_local_file_that_is_missing(self):
    with self.assertRaisesRegex(download_flowers.DownloadError, 'No such file'):
      self.download(url=f'file://{self.dir}/none.tgz')
    with self.assertRaisesRegex(download_flowers.DownloadError, 'none: unknown url type'):
      self.download(url='none')

  def assertHostile(self, message, **attributes):
    member = tarfile.TarInfo('flower_photos/evil')
    for name, value in attributes.items():
      setattr(member, name, value)
    self.serve(make_archive([member]))
    with self.assertRaisesRegex(download_flowers.DownloadError, message):
      self.download()
    self.assertEqual(os.listdir(self.dataset_dir), ['flower_photos.tgz'])
    self.assertEqual(os.listdir(self.dir), ['data'])

  def test_hostile_archives(self):
    outside = 'would write outside of its folder'
    self.assertHostile(outside, name='../evil')
    self.assertHostile(outside, name='flower_photos/../../../evil')
    self.assertHostile(outside, name=os.path.join(self.dir, 'evil'))
    neither = 'neither a file nor a folder'
    self.assertHostile(neither, type=tarfile.SYMTYPE, linkname='/etc')
    self.assertHostile(neither, type=tarfile.LNKTYPE, linkname='flower_photos/LICENSE.txt')
    self.assertHostile(neither, type=tarfile.FIFOTYPE)
    self.assertHostile(neither, type=tarfile.CHRTYPE)
    with mock.patch.object(download_flowers, 'MAX_MEMBERS', 9):
      self.assertHostile('unpacks to more than 9 files')
    with mock.patch.object(download_flowers, 'MAX_BYTES', 100_000):
      self.assertHostile('more than .* 100000 bytes', size=200_000)
    self.assertHostile('should hold one folder', name='elsewhere/evil')

  def test_no_archive(self):
    for content in (b'<html>no archive</html>', self.server.content[:3000]):
      self.serve(content)
      with self.assertRaisesRegex(download_flowers.DownloadError, 'cannot be unpacked'):
        self.download()
      self.assertEqual(os.listdir(self.dataset_dir), ['flower_photos.tgz'])


if __name__ == '__main__':
  tf.test.main()
