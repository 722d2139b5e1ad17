from pkvsim.cli import main

main()
