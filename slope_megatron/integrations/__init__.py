"""Where this project meets hosts: Megatron's own scripts, machines without a GPU."""
