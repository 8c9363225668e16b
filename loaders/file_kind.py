"""What a file really is, by its first bytes."""

from __future__ import annotations

HEAD_BYTES = 512
_LFS_POINTER = b"version https://git-lfs"
_PYTORCH = "a PyTorch checkpoint (.pt, .ckpt)"
_MAGICS = (
    (b"PK\x03\x04", f"{_PYTORCH} or another zip archive"),
    (b"\x80\x02", f"{_PYTORCH}, a Python pickle"),
    (b"\x80\x03", f"{_PYTORCH}, a Python pickle"),
    (b"\x80\x04", f"{_PYTORCH}, a Python pickle"),
    (b"\x80\x05", f"{_PYTORCH}, a Python pickle"),
    (b"lmgg", "an old GGML file (before GGUF)"),
    (b"fmgg", "an old GGML file (before GGUF)"),
    (b"tjgg", "an old GGML file (before GGUF)"),
    (b"\x1f\x8b", "a compressed archive (gzip)"),
    (b"7z\xbc\xaf\x27\x1c", "a compressed archive (7z)"),
    (b"Rar!", "a compressed archive (rar)"),
    (b"\x89PNG", "a picture (PNG)"),
)


def container_of(head: bytes) -> str | None:
    """`safetensors` or `gguf`, if the first bytes of the file look like one."""
    if head.startswith(b"GGUF"):
        return "gguf"
    # A safetensors header starts with its length and a brace. Only then can 0x80 0x02 be something other than a pickle.
    looks_like_safetensors = head[8:9] == b"{" and head[5:8] == b"\0\0\0"
    return "safetensors" if looks_like_safetensors else None


def describe_other(head: bytes) -> str | None:
    """What a file that is neither container seems to be, or None."""
    for magic, description in _MAGICS:
        if head.startswith(magic):
            return description
    if head.startswith(_LFS_POINTER):
        return "a git-lfs pointer, a small text that stands for the real file"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page"
    if text.startswith(b"{"):
        return "a JSON text"
    return "only zero bytes at its start" if head and not any(head) else None
