"""Tests of the download against a server on this machine, and of hostile archives."""

import errno
import hashlib
import http.server
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from unittest import mock

import tensorflow.compat.v1 as tf

from create_tfrecords_test import image_bytes
import download_flowers
from records import flowers
from scripts import PROJECT


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
  """Serves `content`; `requests` are the Range headers that came, `sent` the bytes of bodies."""

  def __init__(self, content):
    super().__init__(('127.0.0.1', 0), Handler)
    self.content = content
    self.requests = []
    self.sent = 0
    self.takes_ranges = True
    self.cut_after = None  # bytes, of the next response only
    self.stall_after = None  # bytes, after which it sends nothing more until `go_on`
    self.go_on = threading.Event()
    self.first_byte = None  # where a part really begins, if not where it should
    self.sends_length = True
    self.status = 200
    # Short polls, so that it also stops soon.
    threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()


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
    if server.first_byte is not None:
      start = server.first_byte
    if requested and server.takes_ranges:
      self.send_response(206)
      self.send_header('Content-Range',
                       f'bytes {start}-{len(server.content) - 1}/{len(server.content)}')
    else:
      self.send_response(200)
    if server.sends_length:
      self.send_header('Content-Length', str(len(server.content) - start))
    self.end_headers()
    end = len(server.content) if server.cut_after is None else start + server.cut_after
    server.cut_after = None
    if server.stall_after is not None:
      self.wfile.write(server.content[start:server.stall_after])
      server.go_on.wait(30)
      return
    self.wfile.write(server.content[start:end])
    server.sent += end - start

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
    self.assertEqual(self.server.sent, len(self.server.content) - 1000)
    self.check_dataset()

  def test_killed_and_run_again(self):
    self.server.stall_after = 2000
    process = subprocess.Popen(
        [sys.executable, 'download_flowers.py', '--dataset_dir', self.dataset_dir,
         '--url', self.url, '--sha256', hashlib.sha256(self.server.content).hexdigest()],
        cwd=PROJECT, stderr=subprocess.DEVNULL)
    part = os.path.join(self.dataset_dir, 'flower_photos.tgz.part')
    # What is killed in Python's buffer is lost, so that the size on the disk is not asserted.
    deadline = time.monotonic() + 60
    while not os.path.exists(part) and time.monotonic() < deadline:
      time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    self.assertEqual(os.listdir(self.dataset_dir), ['flower_photos.tgz.part'])
    self.server.stall_after = None
    self.server.go_on.set()
    # A kill while unpacking leaves this.
    os.makedirs(os.path.join(self.dataset_dir, 'flower_photos.tmp', 'flower_photos', 'daisy'))
    self.download()
    self.check_dataset()

  def test_a_part_that_is_complete(self):
    self.write_part(self.server.content)
    self.download()
    self.assertEqual(self.server.requests, [f'bytes={len(self.server.content)}-'])
    self.check_dataset()

  def test_a_part_of_another_file(self):
    for stale in (b'x' * 1000, b'x' * 2 * len(self.server.content)):
      shutil.rmtree(self.dataset_dir, ignore_errors=True)
      self.write_part(stale)
      self.server.requests.clear()
      self.download()
      self.assertEqual(self.server.requests, [f'bytes={len(stale)}-', None])
      self.check_dataset()

  def test_a_server_that_sends_another_part(self):
    self.write_part(self.server.content[:1000])
    self.server.first_byte = 500
    with self.assertRaisesRegex(download_flowers.DownloadError,
                                'the bytes from 1000 on, it sent bytes 500-'):
      self.download()
    self.assertEqual(os.listdir(self.dataset_dir), ['flower_photos.tgz.part'])

  def test_a_server_that_knows_no_ranges(self):
    self.server.takes_ranges = False
    self.server.sends_length = False
    self.write_part(self.server.content[:1000])
    self.download()
    self.assertEqual(self.server.requests, ['bytes=1000-'])
    self.assertEqual(self.server.sent, len(self.server.content))
    self.check_dataset()

  def test_a_connection_that_is_cut(self):
    self.server.cut_after = 1500
    self.download()
    self.assertEqual(self.server.requests, [None, 'bytes=1500-'])
    self.check_dataset()

  def test_another_checksum(self):
    found = hashlib.sha256(self.server.content).hexdigest()
    with self.assertRaisesRegex(download_flowers.DownloadError,
                                f'{found}, not {"0" * 64}, and were deleted'):
      self.download(sha256='0' * 64)
    self.assertEmpty(os.listdir(self.dataset_dir))
    with self.assertRaises(SystemExit):
      self.download(sha256='none')

  def test_a_checksum_in_capitals(self):
    self.download(sha256=hashlib.sha256(self.server.content).hexdigest().upper())
    self.check_dataset()

  def test_another_size(self):
    begun = self.server.content[:1000]
    self.write_part(begun)
    self.server.takes_ranges = False
    # The default checksum is that of an archive of known size.
    with self.assertRaisesRegex(
        download_flowers.DownloadError,
        f'the file has {len(self.server.content)} bytes, not 228813984'):
      self.download(sha256=download_flowers.SHA256)
    self.assertLen(self.server.requests, 1)
    with open(os.path.join(self.dataset_dir, 'flower_photos.tgz.part'), 'rb') as f:
      self.assertEqual(f.read(), begun)

  def test_a_file_without_end(self):
    self.server.sends_length = False
    with mock.patch.object(download_flowers, 'MAX_BYTES', 1000):
      with self.assertRaisesRegex(download_flowers.DownloadError, 'more than 1000 bytes'):
        self.download()

  def test_no_room(self):
    full = OSError(errno.ENOSPC, 'No space left on device')
    with mock.patch.object(download_flowers, 'open', create=True, side_effect=full):
      with self.assertRaisesRegex(download_flowers.DownloadError,
                                  r'Cannot write .*\.part \(No space left on device\): free some'):
        self.download()
    self.assertLen(self.server.requests, 1)
    with mock.patch.object(tarfile.TarFile, 'extractall', side_effect=full):
      with self.assertRaisesRegex(download_flowers.DownloadError,
                                  r'Cannot unpack .* \(No space left on device\)'):
        self.download()
    self.assertEqual(os.listdir(self.dataset_dir), ['flower_photos.tgz'])
    full = tf.errors.ResourceExhaustedError(None, None, 'No space left on device')
    with mock.patch.object(tf.python_io.TFRecordWriter, 'write', side_effect=full):
      with self.assertRaisesRegex(download_flowers.DownloadError, 'Cannot write the TFRecords'):
        self.download()

  def test_a_folder_that_cannot_be_made(self):
    with open(self.dataset_dir, 'w'):
      pass
    with self.assertRaisesRegex(download_flowers.DownloadError, 'Cannot create the folder'):
      self.download()

  def test_a_server_that_refuses(self):
    self.server.status = 404  # for good: asked once
    with self.assertRaisesRegex(download_flowers.DownloadError, 'HTTP Error 404.*--url'):
      self.download()
    self.assertLen(self.server.requests, 1)

  def test_a_server_that_is_busy(self):
    for status in (429, 503):
      self.server.status = status
      self.server.requests.clear()
      with self.assertRaisesRegex(download_flowers.DownloadError, f'HTTP Error {status}'):
        self.download()
      self.assertLen(self.server.requests, download_flowers.ATTEMPTS)

  def test_the_second_url_when_the_first_refuses(self):
    missing = f'file://{self.dir}/none.tgz'
    path = os.path.join(self.dir, 'archive.tgz')
    download_flowers.fetch([missing, self.url], path,
                           hashlib.sha256(self.server.content).hexdigest())
    self.assertEqual(self.server.requests, [None])
    with open(path, 'rb') as f:
      self.assertEqual(f.read(), self.server.content)

  def test_answers_that_are_not_http(self):
    for answer, message in ((b'garbage\r\n\r\n', 'garbage'),
                            (b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc',
                             'the connection broke')):
      with mock.patch.object(Handler, 'do_GET', lambda self, raw=answer: self.wfile.write(raw)):
        with self.assertRaisesRegex(download_flowers.DownloadError, message):
          self.download()

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
    with self.assertRaisesRegex(download_flowers.DownloadError, 'control characters'):
      self.download(url='http://127.0.0.1/a b')

  def test_script_fails_without_a_traceback(self):
    result = subprocess.run(
        [sys.executable, 'download_flowers.py', '--dataset_dir', self.dataset_dir,
         '--url', f'file://{self.dir}/none.tgz'], cwd=PROJECT, capture_output=True, text=True)
    self.assertEqual(result.returncode, 1)
    self.assertRegex(result.stderr, 'download_flowers.py: Cannot download .*No such file')
    self.assertNotIn('Traceback', result.stderr)

  def test_the_usual_split_is_the_default(self):
    args = download_flowers.parse_args(['--dataset_dir', 'unused'])
    class_sizes = [633, 898, 641, 699, 799]  # of the 3,670 photographs
    self.assertEqual(sum(round(args.validation_fraction * size) for size in class_sizes), 350)

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
    outside = 'outside the destination'
    self.assertHostile(outside, name='../evil')
    self.assertHostile(outside, name='flower_photos/../../../evil')
    self.assertHostile('should hold one folder', name=os.path.join(self.dir, 'evil'))
    neither = 'neither a file nor a folder'
    self.assertHostile(neither, type=tarfile.SYMTYPE, linkname='/etc')
    self.assertHostile(neither, type=tarfile.LNKTYPE, linkname='flower_photos/LICENSE.txt')
    self.assertHostile(neither, type=tarfile.FIFOTYPE)
    self.assertHostile(neither, type=tarfile.CHRTYPE)
    with mock.patch.object(download_flowers, 'MAX_MEMBERS', 9):
      self.assertHostile('holds more than 9 files')
    with mock.patch.object(download_flowers, 'MAX_BYTES', 100_000):
      self.assertHostile('more than .* 100000 bytes', size=200_000)
    self.assertHostile('should hold one folder', name='elsewhere/evil')
    self.assertHostile('Cannot unpack', name='flower_photos/LICENSE.txt/evil')
    self.assertHostile('embedded null', pax_headers={'path': 'flower_photos/a\0b'})
    self.assertHostile('timestamp out of range', pax_headers={'mtime': '1e400'})

  def test_no_archive(self):
    for content in (b'<html>no archive</html>', self.server.content[:3000]):
      self.serve(content)
      with self.assertRaisesRegex(download_flowers.DownloadError, 'Cannot unpack'):
        self.download()
      self.assertEqual(os.listdir(self.dataset_dir), ['flower_photos.tgz'])
