"""Downloads the flower photographs and makes TFRecords of them.

  python download_flowers.py --dataset_dir flower_data

Fetches flower_photos.tgz (229 MB; 3,670 photographs of five classes), goes on
where an earlier run was interrupted, verifies the checksum, unpacks it into
flower_photos in --dataset_dir, and writes the shards and labels.txt beside it.
The photographs are CC-BY; flower_photos/LICENSE.txt names those who took them.
"""

import argparse
import hashlib
import os
import pathlib
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib

import tqdm

import create_tfrecords
import flowers
import options

URLS = (
    'https://download.tensorflow.org/example_images/flower_photos.tgz',
    # The checksum, not the connection, tells that it is the archive.
    'http://download.tensorflow.org/example_images/flower_photos.tgz',
)
SHA256 = '4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c'
VALIDATION_FRACTION = 350 / 3670  # the usual split
PHOTOS = 'flower_photos'

ATTEMPTS = 4
FIRST_PAUSE_SECS = 1.0  # doubled from one attempt to the next
TIMEOUT_SECS = 30
CHUNK = 1 << 20  # bytes
# What an archive may unpack to; the photographs are 3,676 members of 230 MB.
MAX_MEMBERS = 100_000
MAX_BYTES = 4 * 2**30


class DownloadError(Exception):
  """The archive cannot be fetched, or is not what it should be."""


def fetch(urls, path, sha256):
  """Downloads a file and gives it its name when its checksum is right.

  Args:
    urls: where it is; tried in turns.
    path: file to write; what was fetched so far is kept as `path`.part.
    sha256: the expected checksum, hexadecimal.

  Raises:
    DownloadError: no URL gives the file, or its checksum is another.
  """
  part = path + '.part'
  for attempt in range(ATTEMPTS):
    for url in urls:
      try:
        fetch_rest(url, part)
        break
      except (OSError, ValueError) as error:  # URLError is an OSError
        failure = f'{url}: {error}'
    else:
      if attempt < ATTEMPTS - 1:
        time.sleep(FIRST_PAUSE_SECS * 2**attempt)
      continue
    break
  else:
    raise DownloadError(f'Cannot download the photographs: {failure}. Run it again to go on, '
                        'or give a mirror or a local file:// with --url')
  found = sha256_of(part)
  if found != sha256:
    os.remove(part)
    raise DownloadError(f'The checksum of what {url} gave is {found}, not {sha256}: it was '
                        'removed. Run it again, or give another --url')
  os.replace(part, path)


def fetch_rest(url, part):
  """Appends to `part` what it lacks of the file at a URL.

  Raises:
    OSError: the server refuses, or the connection ended early.
  """
  start = os.path.getsize(part) if os.path.exists(part) else 0
  request = urllib.request.Request(url, headers={'Range': f'bytes={start}-'} if start else {})
  try:
    response = urllib.request.urlopen(request, timeout=TIMEOUT_SECS)
  except urllib.error.HTTPError as error:
    if error.code == 416 and start:  # nothing lies behind what we have
      return
    raise
  with response:
    continued = getattr(response, 'status', None) == 206
    start = start if continued else 0
    length = response.headers.get('Content-Length')
    total = start + int(length) if length else None
    with open(part, 'ab' if continued else 'wb') as f, tqdm.tqdm(
        total=total, initial=start, unit='B', unit_scale=True, disable=None) as progress:
      while chunk := response.read(CHUNK):
        f.write(chunk)
        progress.update(len(chunk))
        if f.tell() > MAX_BYTES:
          raise OSError(f'it sends more than {MAX_BYTES} bytes')
      if total is not None and f.tell() < total:
        raise OSError(f'the connection ended after {f.tell()} of {total} bytes')


def sha256_of(path):
  """Returns the SHA-256 of a file, hexadecimal."""
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def unpack(archive, folder):
  """Unpacks an archive of one folder, and gives this its name when it is complete.

  Args:
    archive: a .tgz file.
    folder: what its folder is to be called; it must not exist.

  Raises:
    DownloadError: the archive is damaged, or would write elsewhere, make links
      or devices, or fill the disk; nothing of it is kept.
  """
  temporary = folder + '.tmp'
  shutil.rmtree(temporary, ignore_errors=True)
  try:
    os.mkdir(temporary)
    with tarfile.open(archive) as tar:
      count, size = 0, 0
      for member in tar:
        count, size = count + 1, size + member.size
        _check_member(member, count, size)
        tar.extract(member, temporary, filter='data')
    top = os.listdir(temporary)
    if len(top) != 1 or not os.path.isdir(os.path.join(temporary, top[0])):
      raise DownloadError(f'{archive} should hold one folder, but it holds {sorted(top)[:5]}')
    os.rename(os.path.join(temporary, top[0]), folder)
  except (tarfile.TarError, EOFError, zlib.error) as error:
    raise DownloadError(f'{archive} cannot be unpacked: {error}') from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _check_member(member, count, size):
  path = pathlib.PurePosixPath(member.name)
  if path.is_absolute() or '..' in path.parts:
    raise DownloadError(f'The archive would write outside of its folder: {member.name!r}')
  if not (member.isfile() or member.isdir()):
    raise DownloadError(f'The archive holds {member.name!r}, neither a file nor a folder')
  if count > MAX_MEMBERS or size > MAX_BYTES:
    raise DownloadError(f'The archive unpacks to more than {MAX_MEMBERS} files or '
                        f'{MAX_BYTES} bytes')


def parse_args(argv=None):
  parser = argparse.ArgumentParser(
      description=__doc__.split('\n')[0], formatter_class=options.HelpFormatter,
      epilog='The photographs are CC-BY: flower_photos/LICENSE.txt names those who took them.')
  parser.add_argument('--dataset_dir', required=True, help='folder to write to')
  parser.add_argument('--url', help='a mirror, or a local file:// (default: '
                      'download.tensorflow.org)')
  parser.add_argument('--sha256', default=SHA256, help='checksum of the archive')
  parser.add_argument('--validation_fraction', type=options.fraction,
                      default=VALIDATION_FRACTION,
                      help='share of every class that is kept from training')
  parser.add_argument('--num_shards', type=options.positive_int, default=2,
                      help='files per split')
  parser.add_argument('--seed', type=options.non_negative_int, default=0,
                      help='of the split and the order')
  parser.add_argument('--overwrite', action='store_true', help='replace existing TFRecords')
  return parser.parse_args(argv)


def main(args):
  os.makedirs(args.dataset_dir, exist_ok=True)
  archive = os.path.join(args.dataset_dir, PHOTOS + '.tgz')
  photos = os.path.join(args.dataset_dir, PHOTOS)
  if not os.path.isdir(photos):
    if not (os.path.exists(archive) and sha256_of(archive) == args.sha256):
      fetch([args.url] if args.url else URLS, archive, args.sha256)
    unpack(archive, photos)
  create_tfrecords.create_dataset(
      photos, args.dataset_dir, validation_fraction=args.validation_fraction,
      num_shards=args.num_shards, seed=args.seed, overwrite=args.overwrite)
  print(f'Wrote {args.dataset_dir}. The photographs are CC-BY: '
        f'{os.path.join(photos, "LICENSE.txt")} names those who took them')


if __name__ == '__main__':
  try:
    main(parse_args())
  except (DownloadError, flowers.DatasetError, OSError) as error:
    sys.exit(f'download_flowers.py: {error}')
  except KeyboardInterrupt:
    sys.exit('download_flowers.py: interrupted; run it again to go on')
