"""A Jittor that starts: everything that must happen before and after `import jittor`, in one place.

    from moss_jt import startup
    jt = startup.import_jittor(device="auto")

Importing this package loads neither Jittor nor numpy and changes nothing. The order of the rooms:

    starting    import_jittor: asks plan, then compiling, then loading, then selfcheck
    plan        what to do on this machine, as a value; uses machine, gpu, cuda_home, onednn, jittor_copy, tools
    compiling   the one-time compilation in a child process: lock, progress, stamp; build is that child
    loading     the import itself, inside isolation, which gives the process back as it was
    selfcheck   a few numbers read back and multiplied, after every start
"""

from __future__ import annotations

from moss_jt.startup.starting import compile_needed, device_in_use, device_reason, import_jittor

__all__ = ["compile_needed", "device_in_use", "device_reason", "import_jittor"]
