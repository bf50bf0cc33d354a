from vitalis_load.cli import main

main()
