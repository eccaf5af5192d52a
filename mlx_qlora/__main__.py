import sys

from mlx_qlora.commands import main

sys.exit(main())
