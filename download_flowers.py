"""Downloads the flower photographs and makes TFRecords of them.

  python download_flowers.py --dataset_dir flower_data

Fetches flower_photos.tgz (229 MB; 3,670 photographs of five classes), goes on
where an earlier run was interrupted, verifies the checksum, unpacks it into
flower_photos in --dataset_dir, and writes the shards and labels.txt beside it.
The photographs are CC-BY; flower_photos/LICENSE.txt names those who took them.
"""

import argparse
import gzip
import http.client
import os
import pathlib
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
from records import creation
from records import flowers

URLS = (
    'https://download.tensorflow.org/example_images/flower_photos.tgz',
    # The checksum, not the connection, tells that it is the archive.
    'http://download.tensorflow.org/example_images/flower_photos.tgz',
)
SHA256 = '4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c'
SIZE = 228_813_984  # bytes
VALIDATION_FRACTION = 350 / 3670  # the usual split
PHOTOS = 'flower_photos'
LICENSE = 'LICENSE.txt'

ATTEMPTS = 4
FIRST_PAUSE_SECS = 1.0  # doubled from one attempt to the next
TIMEOUT_SECS = 30  # without a byte
CHUNK = 1 << 16  # bytes
BUSY = (408, 425, 429)  # the refusals of HTTP that another attempt may not meet
# What an archive may unpack to; the photographs are some 3,700 members of 230 MB.
MAX_MEMBERS = 100_000
MAX_BYTES = 4 * 2**30
# All that tarfile lets through of a damaged or a hostile archive.
BAD_ARCHIVE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError,
               OverflowError, RecursionError)


class DownloadError(Exception):
  """The archive cannot be fetched, or is not what it should be."""


class ServerError(Exception):
  """A URL did not give the file; `is_final` tells that it would not later either."""

  def __init__(self, message, is_final=False):
    super().__init__(message)
    self.is_final = is_final


def fetch(urls, path, sha256, size=None):
  """Downloads a file and gives it its name when its checksum is right.

  Args:
    urls: where it is; tried in turns.
    path: file to write; what was fetched so far is kept as `path`.part.
    sha256: the expected checksum, hexadecimal, in small letters.
    size: the expected size in bytes; None is any up to MAX_BYTES.

  Raises:
    DownloadError: no URL gives the file, its checksum is another, or it cannot
      be written.
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
      raise DownloadError(f'Cannot write {part} ({error.strerror}): make room, or choose another '
                          '--dataset_dir; run it again to go on') from error
    if not resumed:
      raise DownloadError(
          f'The checksum of the {found_size} bytes that {url} gave is {found}, not {sha256}: they '
          'were removed. Run it again, or give another --url, or the --sha256 of another archive')
    print(f'{part} was not the beginning of this file: starting anew', file=sys.stderr)


def fetch_from_any(urls, part, size):
  """Completes `part` from the first URL that gives the file; returns that URL."""
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
  raise DownloadError(f'Cannot download the photographs: {reasons}. Run it again to go on, '
                      'or give a mirror or a local file:// with --url')


def fetch_rest(url, part, size):
  """Appends to `part` what it lacks of the file at a URL.

  Raises:
    ServerError: the server refuses, has a file of another size, or the
      connection ended early.
    OSError: `part` cannot be written.
  """
  start = os.path.getsize(part) if os.path.exists(part) else 0
  response = open_url(url, start)
  if response is None:
    return
  with response:
    continued = response.status == 206
    if continued and not response.headers.get('Content-Range', '').startswith(f'bytes {start}-'):
      raise ServerError(f'asked for what follows byte {start}, it sends '
                        f'{response.headers.get("Content-Range")}', is_final=True)
    start = start if continued else 0
    length = response.headers.get('Content-Length', '')
    total = start + int(length) if length.isdecimal() else size
    # Before `part` is touched: this may be the login page of a wireless network.
    if size and total != size:
      raise ServerError(f'the file there has {total} bytes, not {size}', is_final=True)
    limit = size or MAX_BYTES
    with open(part, 'ab' if continued else 'wb') as f, tqdm.tqdm(
        desc='Downloading', total=total, initial=start, unit='B', unit_scale=True,
        disable=None) as progress:
      for chunk in read_chunks(response):
        f.write(chunk)
        progress.update(len(chunk))
        if f.tell() > limit:
          raise ServerError(f'it sends more than {limit} bytes', is_final=True)
      if total is not None and f.tell() < total:
        raise ServerError(f'the connection ended after {f.tell()} of {total} bytes')


def open_url(url, start):
  """Asks for a file from byte `start` on.

  Returns:
    A response, whose status is 206 if it begins there; None if the file has no
    byte there.

  Raises:
    ServerError: the server cannot be reached, or refuses; or this is no URL.
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
  """Yields the bytes of a response as they come; raises ServerError if it breaks."""
  while True:
    try:
      chunk = response.read1(CHUNK)
    except (OSError, ValueError, http.client.HTTPException) as error:
      raise ServerError(f'the connection broke ({error})') from error
    if not chunk:
      return
    yield chunk


def unpack(archive, folder):
  """Unpacks an archive of one folder, and gives this its name when it is complete.

  Args:
    archive: a .tgz file.
    folder: what its folder is to be called; it must not exist.

  Raises:
    DownloadError: the archive is damaged, or would write elsewhere, make links
      or devices, write a file twice, or fill the disk; or there is no room.
      Nothing of it is kept.
  """
  temporary = folder + '.tmp'
  shutil.rmtree(temporary, ignore_errors=True)
  try:
    os.mkdir(temporary)
    with tarfile.open(archive, 'r:gz') as tar:
      for member in checked_members(tar):
        tar.extract(member, temporary, filter='data')
    top = os.listdir(temporary)
    if len(top) != 1 or not os.path.isdir(os.path.join(temporary, top[0])):
      raise DownloadError(f'{archive} should hold one folder, but it holds {sorted(top)[:5]}: '
                          'give another --url')
    os.rename(os.path.join(temporary, top[0]), folder)
  except BAD_ARCHIVE as error:
    raise DownloadError(f'{archive} cannot be unpacked: {error}. Give another --url') from error
  except OSError as error:
    raise DownloadError(f'Cannot unpack {archive} to {folder} ({error.strerror}), nothing of '
                        'it was kept: make room, or give another --dataset_dir or --url') from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def checked_members(tar):
  """Yields the members of an archive; raises DownloadError at one that is not harmless."""
  paths, size = set(), 0
  for member in tar:
    path = pathlib.PurePosixPath(member.name)
    size += member.size
    if path.is_absolute() or '..' in path.parts:
      raise DownloadError(f'The archive would write outside of its folder: {member.name!r}. '
                          'Give another --url')
    if not (member.isfile() or member.isdir()):
      raise DownloadError(f'The archive holds {member.name!r}, neither a file nor a folder: '
                          'give another --url')
    if path in paths:
      raise DownloadError(f'The archive holds {member.name!r} twice: give another --url')
    paths.add(path)
    if len(paths) > MAX_MEMBERS or size > MAX_BYTES:
      raise DownloadError(f'The archive unpacks to more than {MAX_MEMBERS} files or '
                          f'{MAX_BYTES} bytes: give another --url')
    yield member


def checksum(text):
  """Returns a SHA-256 in small letters; the argparse type of --sha256."""
  if not re.fullmatch('[0-9a-fA-F]{64}', text):
    raise argparse.ArgumentTypeError(f'must be 64 hexadecimal digits, got {text}')
  return text.lower()


def parse_args(argv=None):
  parser = argparse.ArgumentParser(
      description=__doc__.split('\n')[0], formatter_class=arguments.HelpFormatter,
      epilog='The photographs are CC-BY: flower_photos/LICENSE.txt names those who took them.')
  parser.add_argument('--dataset_dir', required=True, help='folder to write to')
  parser.add_argument('--url', help='a mirror, or a local file:// (default: '
                      'download.tensorflow.org)')
  parser.add_argument('--sha256', type=checksum, default=SHA256, help='checksum of the archive')
  parser.add_argument('--validation_fraction', type=arguments.fraction,
                      default=VALIDATION_FRACTION,
                      help='share of every class that is kept from training')
  parser.add_argument('--num_shards', type=arguments.positive_int, default=2,
                      help='files per split')
  parser.add_argument('--seed', type=arguments.non_negative_int, default=0,
                      help='of the split and the order')
  parser.add_argument('--overwrite', action='store_true', help='replace existing TFRecords')
  return parser.parse_args(argv)


def main(args):
  try:
    os.makedirs(args.dataset_dir, exist_ok=True)
  except OSError as error:
    raise DownloadError(f'Cannot make the folder {args.dataset_dir} ({error.strerror}): choose '
                        'another --dataset_dir') from error
  archive = os.path.join(args.dataset_dir, PHOTOS + '.tgz')
  photos = os.path.join(args.dataset_dir, PHOTOS)
  if not os.path.isdir(photos):
    if not (os.path.exists(archive) and files.sha256(archive) == args.sha256):
      fetch([args.url] if args.url else URLS, archive, args.sha256,
            SIZE if args.sha256 == SHA256 else None)
    unpack(archive, photos)
  try:
    creation.create_dataset(
        photos, args.dataset_dir, validation_fraction=args.validation_fraction,
        num_shards=args.num_shards, seed=args.seed, overwrite=args.overwrite)
  except tf.errors.OpError as error:  # TFRecordWriter's OSError
    raise DownloadError(f'Cannot write the TFRecords ({error.message}): make room, and run it '
                        'again') from error
  print(f'Wrote {args.dataset_dir}')
  credits = os.path.join(photos, LICENSE)
  if os.path.exists(credits):
    print(f'The photographs are CC-BY: {credits} names those who took them')


if __name__ == '__main__':
  try:
    main(parse_args())
  except (DownloadError, flowers.DatasetError, OSError) as error:
    sys.exit(f'download_flowers.py: {error}')
  except KeyboardInterrupt:
    sys.exit('download_flowers.py: interrupted; run it again to go on')
