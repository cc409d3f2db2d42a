from velikiy.cli import main

main()
