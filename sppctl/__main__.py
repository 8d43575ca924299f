from sppctl.cli import main

if __name__ == "__main__":
    main()
