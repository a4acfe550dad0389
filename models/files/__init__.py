"""Files from strangers: read without running code from them, and files of our own: written whole or not at all."""
from models.files.archives import read_npz
from models.files.tensors import (check_content, content_hash, file_hash, first_line, name_some, notify, read_file,
                                  reading, tensors_hash, write_file, writing)
from models.files.vaes import load_state, read_latent_scale

__all__ = ["check_content", "content_hash", "file_hash", "first_line", "load_state", "name_some", "notify", "read_file",
           "read_latent_scale", "read_npz", "reading", "tensors_hash", "write_file", "writing"]
