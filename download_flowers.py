"""Downloads the flower photographs and creates a TFRecord dataset from them.

  python download_flowers.py --dataset_dir flower_data

Downloads flower_photos.tgz (229 MB, 3,670 photographs of five classes), verifies
its checksum, unpacks it to flower_photos in --dataset_dir, and writes the shards
and labels.txt beside it. A second run resumes an interrupted download. The
photographs are licensed CC-BY; flower_photos/LICENSE.txt credits their authors.
"""

import argparse
import gzip
import http.client
import os
import re
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib

import slim_bridge  # noqa: F401, before TensorFlow: see there

import tensorflow.compat.v1 as tf
import tqdm

from common import arguments
from common import files
from common import terminal
from records import creation
from records import flowers

URLS = (
    'https://download.tensorflow.org/example_images/flower_photos.tgz',
    # Plain HTTP is safe because the checksum is verified.
    'http://download.tensorflow.org/example_images/flower_photos.tgz',
)
SHA256 = '4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c'
SIZE = 228_813_984  # bytes
VALIDATION_FRACTION = 350 / 3670  # the usual split
PHOTOS = 'flower_photos'
LICENSE = 'LICENSE.txt'

ATTEMPTS = 4
FIRST_PAUSE_SECS = 1.0  # between attempts; doubles each time
TIMEOUT_SECS = 30  # without receiving a byte
CHUNK = 1 << 16  # bytes
BUSY = (408, 425, 429)  # HTTP client errors that may be temporary
# Limits against decompression bombs; the photographs are about 3,700 files of 230 MB.
MAX_MEMBERS = 100_000
MAX_BYTES = 4 * 2**30
# What tarfile raises on damaged and hostile archives.
BAD_ARCHIVE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError,
               OverflowError, RecursionError)


class DownloadError(Exception):
  """The archive cannot be downloaded or unpacked; the message says what to do."""


class ServerError(Exception):
  """A URL did not deliver the file; `is_final` says that a retry is pointless."""

  def __init__(self, message, is_final=False):
    super().__init__(message)
    self.is_final = is_final


def fetch(urls, path, sha256, size=None):
  """Downloads a file, and renames it to `path` once its checksum is verified.

  Args:
    urls: URLs of the file, tried in turn.
    path: path of the file; an incomplete download is kept as `path`.part.
    sha256: expected SHA-256 in lowercase hexadecimal.
    size: expected size in bytes; None accepts any size up to MAX_BYTES.

  Raises:
    DownloadError: no URL delivers the file, its checksum is wrong, or it cannot be
      written.
  """
  part = path + '.part'
  while True:
    resumed = os.path.exists(part)
    try:
      url = fetch_from_any(urls, part, size)
      found = files.sha256(part)
      if found == sha256:
        os.replace(part, path)
        return
      found_size = os.path.getsize(part)
      os.remove(part)
    except OSError as error:
      raise DownloadError(f'Cannot write {part} ({error.strerror}): free some space or use another '
                          '--dataset_dir, then run the script again to resume') from error
    if not resumed:
      raise DownloadError(
          f'The {found_size} bytes from {url} have the checksum {found}, not {sha256}, and were '
          'deleted. Run the script again, or use another --url, or the --sha256 of that archive')
    print(f'{part} does not belong to this file: downloading it again', file=sys.stderr)


def fetch_from_any(urls, part, size):
  """Completes `part` from the first URL that delivers the file; returns that URL."""
  failures = {}
  for attempt in range(ATTEMPTS):
    for url in urls:
      try:
        fetch_rest(url, part, size)
        return url
      except ServerError as error:
        failures[url] = error
    urls = [url for url in urls if not failures[url].is_final]
    if not urls:
      break
    if attempt < ATTEMPTS - 1:
      time.sleep(FIRST_PAUSE_SECS * 2**attempt)
  reasons = '; '.join(f'{url}: {error}' for url, error in failures.items())
  raise DownloadError(f'Cannot download the photographs: {reasons}. Run the script again to '
                      'resume, or pass a mirror or a local file:// as --url')


def fetch_rest(url, part, size):
  """Downloads the rest of a partial file.

  Raises:
    ServerError: the server refuses, has a file of another size, or closes the
      connection early.
    OSError: `part` cannot be written.
  """
  start = os.path.getsize(part) if os.path.exists(part) else 0
  response = open_url(url, start)
  if response is None:
    return
  with response:
    continued = response.status == 206
    if continued and not response.headers.get('Content-Range', '').startswith(f'bytes {start}-'):
      raise ServerError(f'asked for the bytes from {start} on, it sent '
                        f'{response.headers.get("Content-Range")}', is_final=True)
    start = start if continued else 0
    length = response.headers.get('Content-Length', '')
    total = start + int(length) if length.isdecimal() else size
    # Checked before `part` is changed: this may be the login page of a wireless network.
    if size and total != size:
      raise ServerError(f'the file has {total} bytes, not {size}; for another archive, pass its '
                        '--sha256', is_final=True)
    limit = size or MAX_BYTES
    with open(part, 'ab' if continued else 'wb') as f, tqdm.tqdm(
        desc='Downloading', total=total, initial=start, unit='B', unit_scale=True,
        disable=None) as progress:
      for chunk in read_chunks(response):
        f.write(chunk)
        progress.update(len(chunk))
        if f.tell() > limit:
          raise ServerError(f'the file has more than {limit} bytes', is_final=True)
      if total is not None and f.tell() < total:
        raise ServerError(f'the connection closed after {f.tell()} of {total} bytes')


def open_url(url, start):
  """Requests a file from byte `start` on.

  Returns:
    The response, with status 206 if it begins at `start`; None if the file ends
    before.

  Raises:
    ServerError: the server cannot be reached or refuses, or the URL is invalid.
  """
  is_local = url.startswith('file:')
  try:
    request = urllib.request.Request(url, headers={'Range': f'bytes={start}-'} if start else {})
    return urllib.request.urlopen(request, timeout=TIMEOUT_SECS)
  except urllib.error.HTTPError as error:
    if error.code == 416 and start:
      return None
    raise ServerError(str(error), 400 <= error.code < 500 and error.code not in BUSY) from error
  except (ValueError, http.client.InvalidURL) as error:
    raise ServerError(str(error), is_final=True) from error
  except (OSError, http.client.HTTPException) as error:
    raise ServerError(str(getattr(error, 'reason', error)).strip(), is_local) from error


def read_chunks(response):
  """Yields the bytes of a response as they arrive; raises ServerError if it breaks off."""
  while True:
    try:
      chunk = response.read1(CHUNK)
    except (OSError, ValueError, http.client.HTTPException) as error:
      raise ServerError(f'the connection broke ({error})') from error
    if not chunk:
      return
    yield chunk


def unpack(archive, folder):
  """Unpacks an archive that holds a single folder, and renames the complete folder.

  Args:
    archive: path of a .tgz file.
    folder: path of the unpacked folder, which must not exist.

  Raises:
    DownloadError: the archive is damaged, hostile or too large, or the disk is full.
      Nothing of it is kept.
  """
  temporary = folder + '.tmp'
  shutil.rmtree(temporary, ignore_errors=True)
  try:
    os.mkdir(temporary)
    with tarfile.open(archive, 'r:gz') as tar:
      tar.extractall(temporary, _limited_members(tar), filter='data')
    top = os.listdir(temporary)
    if len(top) != 1 or not os.path.isdir(os.path.join(temporary, top[0])):
      raise DownloadError(f'{archive} should hold one folder, but it holds {sorted(top)[:5]}: '
                          'use another --url')
    os.rename(os.path.join(temporary, top[0]), folder)
  except BAD_ARCHIVE as error:
    raise DownloadError(f'Cannot unpack {archive}: {error}. Use another --url') from error
  except OSError as error:
    raise DownloadError(f'Cannot unpack {archive} to {folder} ({error.strerror}); nothing was '
                        'kept: free some space, or use another --dataset_dir or --url') from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _limited_members(tar):
  # Links are refused because Python's data filter has let chains of them lead outside.
  size = 0
  for number, member in enumerate(tar, 1):
    size += member.size
    if not (member.isfile() or member.isdir()):
      raise tarfile.ExtractError(f'{member.name!r} is neither a file nor a folder')
    if number > MAX_MEMBERS or size > MAX_BYTES:
      raise tarfile.ExtractError(f'it holds more than {MAX_MEMBERS} files or {MAX_BYTES} bytes')
    yield member


def checksum(text):
  """The argparse type of --sha256; returns lowercase hexadecimal."""
  if not re.fullmatch('[0-9a-fA-F]{64}', text):
    raise argparse.ArgumentTypeError(f'must be 64 hexadecimal digits, got {text}')
  return text.lower()


def parse_args(argv=None):
  parser = argparse.ArgumentParser(
      description=__doc__.split('\n')[0], formatter_class=arguments.HelpFormatter,
      epilog='The photographs are licensed CC-BY; flower_photos/LICENSE.txt credits their authors.')
  parser.add_argument('--dataset_dir', type=arguments.path, required=True,
                      help='folder to write to')
  parser.add_argument('--url', help='URL of a mirror, or a local file:// (default: '
                      'download.tensorflow.org)')
  parser.add_argument('--sha256', type=checksum, default=SHA256, help='checksum of the archive')
  parser.add_argument('--validation_fraction', type=arguments.fraction,
                      default=VALIDATION_FRACTION,
                      help='share of each class that goes to the validation split')
  parser.add_argument('--num_shards', type=arguments.positive_int, default=creation.NUM_SHARDS,
                      help='number of files per split')
  parser.add_argument('--seed', type=arguments.non_negative_int, default=0,
                      help='determines the split and the order of the images')
  parser.add_argument('--overwrite', action='store_true', help='replace existing TFRecords')
  return parser.parse_args(argv)


def main(args):
  try:
    os.makedirs(args.dataset_dir, exist_ok=True)
  except OSError as error:
    raise DownloadError(f'Cannot create the folder {args.dataset_dir} ({error.strerror}): use '
                        'another --dataset_dir') from error
  archive = os.path.join(args.dataset_dir, PHOTOS + '.tgz')
  photos = os.path.join(args.dataset_dir, PHOTOS)
  if not os.path.isdir(photos):
    if not (os.path.exists(archive) and files.sha256(archive) == args.sha256):
      fetch([args.url] if args.url else URLS, archive, args.sha256,
            SIZE if args.sha256 == SHA256 else None)
    unpack(archive, photos)
  elif args.url or args.sha256 != SHA256:
    print(f'Warning: {photos} exists and is used instead of --url', file=sys.stderr)
  try:
    creation.create_dataset(
        photos, args.dataset_dir, validation_fraction=args.validation_fraction,
        num_shards=args.num_shards, seed=args.seed, overwrite=args.overwrite)
  except tf.errors.OpError as error:  # what TFRecordWriter raises if, say, the disk is full
    raise DownloadError(f'Cannot write the TFRecords ({error.message}): free some space, then run '
                        'the script again') from error
  print(f'Wrote {args.dataset_dir}')
  credits = os.path.join(photos, LICENSE)
  if os.path.exists(credits):
    print(f'The photographs are licensed CC-BY; {credits} credits their authors')


if __name__ == '__main__':
  arguments.escape_unprintable_output()
  terminal.interrupt_on_kill()
  try:
    main(parse_args())
  except (DownloadError, flowers.DatasetError, OSError) as error:
    sys.exit(f'download_flowers.py: {error}')
  except KeyboardInterrupt:
    sys.exit('download_flowers.py: interrupted; run the script again to resume')
