// A page opened from a disk may start no Worker. The search is then run by a hidden frame that behaves like one.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super()
      this.waiting = []
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.documentElement.append(frame)
      this.inside = frame.contentWindow
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.inside.importScripts = (...addresses) => Promise.all(addresses.map(each => this.run(each)))
      this.run(address).then(() => {
        this.waiting.forEach(data => this.tell(data))
        this.waiting = null
      })
    }

    run(address) {
      return new Promise((resolve, reject) => {
        const script = this.inside.document.createElement("script")
        script.src = address
        script.onload = resolve
        script.onerror = reject
        this.inside.document.body.append(script)
      })
    }

    tell(data) {
      this.inside.dispatchEvent(new MessageEvent("message", { data }))
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data)
      else this.tell(data)
    }
  }
}
