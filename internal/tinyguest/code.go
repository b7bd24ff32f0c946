package tinyguest

// The fragments below are position independent and run one after another; the
// last one never ends. Ports: 0x3f8 is the first serial port, 0x64 and 0x60
// are the i8042's status or command and its data.

// dirty writes each page's own address at its start.
var dirty = []byte{
	0xbf, 0, 0, 0, 0, //                      mov edi, <first page>
	0xb9, 0, 0, 0, 0, //                      mov ecx, <pages>
	0x48, 0x89, 0x3f, //                   1: mov [rdi], rdi
	0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, //    add edi, 0x1000
	0xff, 0xc9, //                            dec ecx
	0x75, 0xf3, //                            jnz 1b
}

// printMessage does not use rep outsb: Firecracker's serial port takes one
// byte an access.
var printMessage = []byte{
	0xbe, 0, 0, 0, 0, //       mov esi, <message>
	0xb9, 0, 0, 0, 0, //       mov ecx, <length>
	0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
	0xac,       //          1: lodsb
	0xee,       //             out dx, al
	0xff, 0xc9, //             dec ecx
	0x75, 0xfa, //             jnz 1b
}

var endings = map[Then][]byte{
	Reboot: {
		0xb0, 0xfe, //    mov al, 0xfe
		0xe6, 0x64, //    out 0x64, al
		0xf4,       // 1: hlt
		0xeb, 0xfd, //    jmp 1b
	},
	Idle: {
		0xf4,       // 1: hlt
		0xeb, 0xfd, //    jmp 1b
	},
	Spin: {
		0xf3, 0x90, // 1: pause
		0xeb, 0xfc, //    jmp 1b
	},
	Count: {
		0x31, 0xdb, //                         xor ebx, ebx
		0x66, 0xba, 0xf8, 0x03, //          1: mov dx, 0x3f8
		0xb9, 0x08, 0x00, 0x00, 0x00, //       mov ecx, 8
		0xc1, 0xc3, 0x04, //                2: rol ebx, 4
		0x88, 0xd8, //                         mov al, bl
		0x24, 0x0f, //                         and al, 0x0f
		0x3c, 0x0a, //                         cmp al, 10
		0x72, 0x02, //                         jb 3f
		0x04, 0x27, //                         add al, 'a'-'0'-10
		0x04, 0x30, //                      3: add al, '0'
		0xee,       //                         out dx, al
		0xff, 0xc9, //                         dec ecx
		0x75, 0xec, //                         jnz 2b
		0xb0, 0x0a, //                         mov al, '\n'
		0xee,       //                         out dx, al
		0xff, 0xc3, //                         inc ebx
		0x0f, 0x31, //                         rdtsc
		0x89, 0xc6, //                         mov esi, eax
		0xf3, 0x90, //                      4: pause
		0x0f, 0x31, //                         rdtsc
		0x29, 0xf0, //                         sub eax, esi
		0x3d, 0x00, 0x00, 0x00, 0x02, //       cmp eax, 1<<25 (11 ms at 3 GHz)
		0x72, 0xf3, //                         jb 4b
		0xeb, 0xcb, //                         jmp 1b
	},
	AwaitKey: {
		0x0f, 0x31, //                   1: rdtsc
		0x89, 0xc6, //                      mov esi, eax
		0xf3, 0x90, //                   2: pause
		0x0f, 0x31, //                      rdtsc
		0x29, 0xf0, //                      sub eax, esi
		0x3d, 0x00, 0x00, 0x20, 0x00, //    cmp eax, 1<<21 (0.7 ms at 3 GHz)
		0x72, 0xf3, //                      jb 2b
		0xe4, 0x64, //                      in al, 0x64
		0xa8, 0x01, //                      test al, 1 (output buffer full)
		0x74, 0xe9, //                      jz 1b
		0xb0, 0xfe, //                      mov al, 0xfe
		0xe6, 0x64, //                      out 0x64, al
		0xf4,       //                   3: hlt
		0xeb, 0xfd, //                      jmp 3b
	},
	Echo: {
		0x0f, 0x31, //                   1: rdtsc
		0x89, 0xc6, //                      mov esi, eax
		0xf3, 0x90, //                   2: pause
		0x0f, 0x31, //                      rdtsc
		0x29, 0xf0, //                      sub eax, esi
		0x3d, 0x00, 0x00, 0x20, 0x00, //    cmp eax, 1<<21 (0.7 ms at 3 GHz)
		0x72, 0xf3, //                      jb 2b
		0x66, 0xba, 0xfd, 0x03, //       3: mov dx, 0x3fd
		0xec,       //                      in al, dx
		0xa8, 0x01, //                      test al, 1 (data ready)
		0x74, 0xe6, //                      jz 1b
		0x66, 0xba, 0xf8, 0x03, //          mov dx, 0x3f8
		0xec,       //                      in al, dx
		0xee,       //                      out dx, al
		0xeb, 0xef, //                      jmp 3b
	},
	TripleFault: {
		0x0f, 0x01, 0x1d, 0x02, 0x00, 0x00, 0x00, // lidt [rip+2]
		0x0f, 0x0b, //                               ud2
		0, 0, 0, 0, 0, 0, 0, 0, 0, 0, //             empty descriptor table
	},
	Crash: {
		0xb8, 0x00, 0xf0, 0xff, 0x3f, // mov eax, 1<<30 - 4096
		0xff, 0xe0, //                   jmp rax
	},
	Flood: {
		0x66, 0xba, 0xf8, 0x03, //    mov dx, 0x3f8
		0xb0, 0x0a, //             1: mov al, '\n'
		0xee,       //                out dx, al
		0xb0, 0x21, //                mov al, '!'
		0xee,       //             2: out dx, al
		0xfe, 0xc0, //                inc al
		0x3c, 0x7f, //                cmp al, 0x7f
		0x75, 0xf9, //                jne 2b
		0xeb, 0xf2, //                jmp 1b
	},
	Sweep: {
		0xbf, 0, 0, 0, 0, //                   1: mov edi, <first page>
		0xb9, 0, 0, 0, 0, //                      mov ecx, <pages>
		0x48, 0x39, 0x3f, //                   2: cmp [rdi], rdi
		0x75, 0x27, //                            jne 4f
		0xff, 0x47, 0x08, //                      inc dword [rdi+8]
		0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, //    add edi, 0x1000
		0xff, 0xc9, //                            dec ecx
		0x75, 0xee, //                            jnz 2b
		0x66, 0xba, 0xf8, 0x03, //                mov dx, 0x3f8
		0xb0, 0x2e, //                            mov al, '.'
		0xee,       //                            out dx, al
		0x0f, 0x31, //                            rdtsc
		0x89, 0xc6, //                            mov esi, eax
		0xf3, 0x90, //                         3: pause
		0x0f, 0x31, //                            rdtsc
		0x29, 0xf0, //                            sub eax, esi
		0x3d, 0x00, 0x00, 0x00, 0x02, //          cmp eax, 1<<25 (11 ms at 3 GHz)
		0x72, 0xf3, //                            jb 3b
		0xeb, 0xca, //                            jmp 1b
		0x66, 0xba, 0xf8, 0x03, //             4: mov dx, 0x3f8
		0xb0, 0x21, //                            mov al, '!'
		0xee,       //                            out dx, al
		0xf4,       //                         5: hlt
		0xeb, 0xfd, //                            jmp 5b
	},
}
