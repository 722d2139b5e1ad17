import sys

if "--outside" in sys.argv[1:]:
    from gpu.calibrate.outside import main
else:
    from gpu.calibrate.run import main

sys.exit(main())
