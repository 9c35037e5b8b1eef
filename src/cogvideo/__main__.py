from cogvideo.cli import main

raise SystemExit(main())
