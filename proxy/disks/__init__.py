"""Virtual disks: files, directories, chains and streams of 2 MiB blocks, one idea of them all."""
