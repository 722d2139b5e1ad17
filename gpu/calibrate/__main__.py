import sys

if "--outside" in sys.argv[1:]:
    from gpu.calibrate.outside import main
elif "--tiers" in sys.argv[1:]:
    from gpu.calibrate.tiers import main
else:
    from gpu.calibrate.run import main

sys.exit(main())
