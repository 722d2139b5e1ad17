import sys

from gpu.calibrate.run import main

sys.exit(main())
